"""
Train iFlame with Accelerate.

    accelerate launch training/train.py [config.yaml] [--option value ...]
    python training/train.py --help

Without arguments a small model learns meshes of furniture and buildings that are generated on the spot.
"""

import math
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict
from itertools import islice
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file, this module must find its siblings

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, send_to_device, set_seed
from torch.distributed.elastic.multiprocessing.errors import record
from tqdm import tqdm
from transformers.utils.logging import disable_progress_bar

from iflame_cli.errors import CommandError
from iflame_hf import IFlameForCausalLM, IFlameTokenizer
from training.arguments import Arguments, parse_arguments
from training.rows.load import Batch, Place
from training.rows.map import Data, load_data
from training.rows.pack import IGNORED
from training.run.card import RunRecord
from training.run.checkpoint import Checkpoints, Progress
from training.run.create import create_accelerator, create_model, prepare, start_trackers
from training.run.ending import ends_in_words
from training.run.interruption import Interruption, Stopped
from training.run.length import Length, count_steps
from training.run.log import RunLog, Window
from training.run.processes import Processes
from training.run.quality import Quality
from training.run.report import loss_line, opening, report_shortfall, shortening
from training.run.resume import choose_checkpoint, lock, resume
from training.run.weights import Weights


@ends_in_words("train")
def main(argv: list[str] | None = None) -> int:
    """
    Train as the command line says. The status is 0 after an interruption that could be saved, too, and 1 where the
    model has not learnt what required_eval_loss asks for.
    """
    arguments = parse_arguments(argv)
    disable_progress_bar()  # of transformers, for writing files; there is one for training
    accelerator = create_accelerator(arguments)
    set_seed(arguments.train.seed)
    tokenizer, model = create_model(arguments)
    data = load_data(arguments, tokenizer, accelerator)
    run = Run(arguments, accelerator, tokenizer, model, data, Interruption())
    with lock(run.output_dir, run.processes):
        run.start()
        with run.interruption:
            learnt = run.finish() if run.train() else True
    accelerator.end_training()
    return 0 if learnt else 1


class Run:
    """One training run: `start`, `train`, and when that says it has come to its end, `finish`."""

    def __init__(
        self,
        arguments: Arguments,
        accelerator: Accelerator,
        tokenizer: IFlameTokenizer,
        model: IFlameForCausalLM,
        data: Data,
        interruption: Interruption,
    ):
        self.arguments = arguments
        self.options = options = arguments.train
        self.accelerator = accelerator
        self.data = data
        self.interruption = interruption
        self.processes = Processes(accelerator, interruption)
        self.output_dir = Path(options.output_dir)
        self.log = RunLog(self.output_dir, accelerator)
        self.checkpoints = Checkpoints(self.output_dir, options.save_total_limit, accelerator, self.log.report)
        self.saved_step: int | None = None
        self.published_step: int | None = None  # if it is not the last one
        self.place: Place | None = None  # in the data, after the last step
        self.failure: Exception | None = None  # of the rows that come next

        accumulated = options.per_device_train_batch_size * options.gradient_accumulation_steps
        self.rows_per_step = accumulated * accelerator.num_processes
        steps = count_steps(options.max_steps, options.num_train_epochs, data.rows.rows_in_epoch, self.rows_per_step)
        self.progress = Progress(planned_steps=steps, data_digest=data.rows.digest(), arguments=arguments.to_dict())

        self.model, self.optimizer, schedule, average = prepare(model, arguments, steps, accelerator)
        self.length = Length(self.progress, schedule, arguments)
        self.weights = Weights(self.model, average, tokenizer, accelerator, str(self.output_dir), self.record)
        self.quality = Quality(self.weights, data, options, self.processes, self.log)

    def record(self) -> RunRecord:
        """What this run knows of the model that it publishes."""
        evaluation = self.log.evaluation(self.published_step or self.progress.step)
        return RunRecord(progress=asdict(self.progress), evaluation=evaluation)

    def start(self) -> None:
        """Begin anew or go on from a checkpoint, and say what is going to happen."""
        accelerator, progress, rows = self.accelerator, self.progress, self.data.rows
        checkpoint = choose_checkpoint(self.checkpoints, self.options.resume_from_checkpoint, accelerator)
        if checkpoint is not None:
            changed = resume(checkpoint, progress, self.length, self.optimizer, accelerator, rows, self.rows_per_step)
            self.saved_step = progress.step
            changes = f" with other {', '.join(sorted(changed))}" if changed else ""
            self.log.report(f"resumed from {checkpoint}{changes}")
        if accelerator.is_main_process:
            self.checkpoints.set_aside(-1 if checkpoint is None else progress.step)
        self.log.cut(progress.step)
        start_trackers(accelerator, self.options, progress.arguments)
        max_steps = self.length.max_steps
        if progress.step >= max_steps:
            self.log.report(f"step {progress.step} of {max_steps} is done: there is nothing left to train")
        parameters = sum(parameter.numel() for parameter in self.model.parameters())
        where = f"{accelerator.num_processes} x {accelerator.device.type}, precision {accelerator.mixed_precision}"
        self.log.report(
            opening(parameters, rows, self.arguments.data.row_length, max_steps, self.rows_per_step, where)
        )

    def train(self) -> bool:
        """Train until the last step or an interruption; whether it was the former."""
        progress, length, options = self.progress, self.length, self.options
        batches = self.data.rows.batches(
            progress.places,
            options.per_device_train_batch_size,
            self.accelerator.process_index,
            self.accelerator.num_processes,
            self.arguments.data.dataloader_num_workers,
            pin_memory=self.accelerator.device.type == "cuda",
        )
        hidden = options.disable_tqdm or not self.accelerator.is_main_process
        bar = tqdm(total=length.max_steps, initial=progress.step, unit="step", disable=hidden)
        pace, window = Window(), Window()
        self.model.train()
        batch, place = self.fetch(batches)
        labels, stop = self.agree(batch, pace)
        if progress.due:
            stop = self.end_step(save=True) or stop
        while progress.step < length.max_steps and not stop:
            began = time.monotonic()
            loss = self.backward(batch, labels)
            learnt, self.place = labels, place
            if progress.step + 1 < length.max_steps:
                # The device still computes the gradients, for which only `update` waits.
                batch, place = self.fetch(batches)
                labels, stop = self.agree(batch, pace)
            loss, gradient_norm = self.update(loss)
            length.count_left_out(gradient_norm is None, learnt)
            seconds = time.monotonic() - began
            progress.add_step(None if gradient_norm is None else loss, learnt, seconds)
            window.add(seconds, self.rows_per_step, learnt)
            if progress.step > 2 or pace.steps:  # the first steps compile and allocate
                pace.add(seconds, self.rows_per_step, learnt)
            if length.is_line_due() and progress.loss_steps:
                bar.set_postfix_str(self.log_loss(gradient_norm, window))
                window = Window()
            bar.total = length.max_steps
            bar.update()
            progress.due += length.judgements_due()
            stop = self.end_step(save=length.is_checkpoint_due()) or stop
        bar.close()
        if progress.step >= length.max_steps and not progress.due:
            return True
        self.stop()
        return False

    def fetch(self, batches: Iterator[tuple[Batch, Place]]) -> tuple[list[Batch], Place]:
        """
        This process's rows of one step, as often as gradients are accumulated, and the place after them. Rows that
        cannot be had end the run, but not before the step at work is done and saved.
        """
        try:
            rows, places = zip(*islice(batches, self.options.gradient_accumulation_steps), strict=True)
        except Exception as failure:
            if self.place is None and not self.progress.step:
                raise
            self.failure = failure
            return [], self.place
        return list(rows), places[-1]

    def agree(self, batch: list[Batch], pace: Window) -> tuple[int, bool]:
        """
        What all processes must know before they learn from a batch: the number of labels that all of them together
        learn from, and whether any was asked to stop or has no rows. Sets the number of the last step, too.
        """
        planned = self.progress.planned_steps
        labels = sum(int((rows["labels"] != IGNORED).sum()) for rows in batch)  # on the host, where the rows still are
        max_steps = self.length.estimate(pace) if self.accelerator.is_main_process else 0
        asked, failed = self.interruption.asked, self.failure is not None
        labels, asked, failed, max_steps = self.processes.sum(labels, asked, failed, max_steps)
        if failed and self.failure is None:
            self.failure = CommandError("another process could not read its rows; it says why")
        if max_steps < planned == self.length.max_steps:
            self.log.report(shortening(pace, self.options.max_minutes, max_steps, planned))
        self.length.set(max_steps)
        return labels, asked > 0 or failed > 0

    def backward(self, batch: list[Batch], labels: int) -> torch.Tensor:
        """
        Gradients of the sum of the losses of all rows of all processes, divided once by the number of their labels.
        Returns this process's part of that loss, which the device may still have to compute.
        """
        accelerator, device = self.accelerator, self.accelerator.device
        total = torch.zeros((), device=device)
        num_items = torch.full((), labels, device=device)
        for index, rows in enumerate(batch):
            rows = send_to_device(rows, device, non_blocking=True)
            last = index == len(batch) - 1
            with nullcontext() if last else accelerator.no_sync(self.model):
                with accelerator.autocast():
                    loss = self.model(**rows, use_cache=False, num_items_in_batch=num_items).loss
                # The mean over processes is what gradients are synchronised to; their sum is wanted.
                accelerator.backward(loss * accelerator.num_processes)
            total += loss.detach()
        return total

    def update(self, loss: torch.Tensor) -> tuple[float, float | None]:
        """
        Clip the gradients and step the optimiser. Returns the loss of all processes and the norm of its gradient,
        None if it was not finite and the step left out.
        """
        accelerator = self.accelerator
        norm = accelerator.clip_grad_norm_(self.model.parameters(), self.options.max_grad_norm or float("inf"))
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # a DTensor where weights are sharded
        both = torch.stack([norm, accelerator.reduce(loss, "sum")])
        norm, total = both.tolist()  # the one wait for the device in a step
        finite = math.isfinite(norm) and math.isfinite(total)
        if finite or accelerator.scaler is not None:  # which leaves the step out by itself, and lowers its scale
            self.optimizer.step()
            finite = finite and not accelerator.optimizer_step_was_skipped
        self.optimizer.zero_grad()
        if not finite:
            losses = gather_object([float(loss)])
            self.log.report(
                f"step {self.progress.step + 1} is left out, its gradient is not finite; losses by process: {losses}"
            )
            return float("nan"), None
        self.length.schedule.step()
        self.weights.update_average()
        return total, norm

    def log_loss(self, gradient_norm: float | None, window: Window) -> str:
        """Write a line on the steps since the line before; returns what the progress bar shows of it."""
        progress, loss = self.progress, self.progress.take_mean_loss()
        line = loss_line(
            loss,
            gradient_norm,
            self.length.schedule.get_last_lr()[0],
            self.data.rows.epochs(self.place),
            progress,
            window,
            self.arguments.data.row_length,
            self.accelerator.device,
        )
        self.log.write(progress.step, line)
        return f"loss {loss:.4f}, {line['tokens_per_second']:,.0f} tokens/s"

    def end_step(self, save: bool) -> bool:
        """Evaluate, sample and save as is due after a step; whether the run was asked to stop meanwhile."""
        due = self.progress.due
        if not due and not save:
            return False
        try:
            while due:
                if due[0] == "evaluation":
                    self.quality.evaluate(self.progress)
                else:
                    self.quality.sample(self.progress.step, self.output_dir / f"samples-{self.progress.step}")
                due.pop(0)
                self.saved_step = None  # its checkpoint says that this is still to be done
            if save:
                self.save()
            self.processes.check()
        except Stopped:
            return True
        return False

    def save(self) -> bool:
        """Save a checkpoint, unless this very step has one; whether it has one now."""
        if self.saved_step == self.progress.step:
            return True
        self.progress.scheduler = self.length.schedule.state_dict()
        if self.place is not None:
            self.progress.places = gather_object([self.place])
        if self.checkpoints.save(self.progress.step, lambda folder: self.weights.save(folder, self.progress)):
            self.saved_step = self.progress.step
        return self.saved_step == self.progress.step

    def stop(self) -> None:
        """Save what can be gone on from. Raises the failure that ends the run, if there is one."""
        stopped = f"stopped after step {self.progress.step} of {self.length.max_steps}"
        is_saved = self.save()
        if self.failure is not None:
            raise self.failure
        if not is_saved:
            raise CommandError(f"{stopped}, which could not be saved: the checkpoints before it are what is left")
        self.log.report(f"{stopped}; --resume_from_checkpoint latest goes on")

    def finish(self) -> bool:
        """
        Leave the finished model with its tokenizer in the output folder, and samples of it. Returns whether it has
        learnt what required_eval_loss asks for, on every process.
        """
        if self.options.load_best_model_at_end:
            self.published_step = self.checkpoints.load_best()
        self.weights.publish(self.output_dir)
        end = f"the model is in {self.output_dir}"
        try:
            self.quality.sample(self.progress.step, self.output_dir)
        except Stopped:
            if self.published_step is None:
                self.save()
            end += ", without samples: --resume_from_checkpoint latest draws them"
        else:
            if self.options.num_samples:
                self.weights.write_card(self.output_dir, ["samples.png"])
        self.log.report(end)
        missed = False
        if self.accelerator.is_main_process:
            record = self.record()
            missed = record.missed_loss
            report_shortfall(record, self.log, can_go_on=bool(self.options.save_steps))
        return not any(gather_object([missed]))


if __name__ == "__main__":
    sys.exit(record(main)())  # a process that fails tells the launcher, which names it and ends the others
