"""
Train iFlame with Accelerate.

    accelerate launch training/train.py [config.yaml] [--option value ...]
    python training/train.py --help

Without arguments a small model learns meshes of furniture and buildings that are generated on the spot.
"""

import os
import sys
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file, this module must find its siblings
if __name__ == "__main__" and "OMP_WAIT_POLICY" not in os.environ:
    # torch's threads on a CPU wait for one another many times in a step. They are to sleep after microseconds and not
    # milliseconds: where another program wants a core, the thread that was put aside then finds one. Torch reads this
    # when it is loaded.
    os.environ.setdefault("GOMP_SPINCOUNT", "1500")

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, set_seed
from torch.distributed.elastic.multiprocessing.errors import record
from tqdm import tqdm
from transformers.utils.logging import disable_progress_bar

from iflame_cli.errors import CommandError
from iflame_hf import IFlameForCausalLM, IFlameTokenizer
from training.arguments import Arguments, parse_arguments
from training.rows.load import Batch, Place
from training.rows.map import Data, load_data
from training.rows.noise import VertexNoise
from training.rows.pack import IGNORED
from training.run.agree import Agreement
from training.run.assess import Assessment
from training.run.checkpoint import Checkpoints, Progress
from training.run.create import (
    compile_blocks,
    create_accelerator,
    create_model,
    create_optimization,
    keep_less,
    sampling_settings,
)
from training.run.ending import ends_in_words
from training.run.interruption import Interruption, Stopped
from training.run.learner import Learner, prepare
from training.run.log import Line, RunLog, Window
from training.run.milestones import Milestones
from training.run.outcome import report_outcome
from training.run.results import StepResult, StepResults
from training.run.resume import find_checkpoint, lock, resume
from training.run.steps import Steps
from training.run.weights import Weights
from training.run.write import ModelWriter


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
    tokenizer, model = create_model(arguments, accelerator)
    data = load_data(arguments, tokenizer, accelerator, model.config)
    run = Run(arguments, accelerator, tokenizer, model, data, Interruption())
    with lock(Path(arguments.train.output_dir), accelerator):
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
        self.noise = VertexNoise(arguments.data.vertex_noise, options.seed, tokenizer.coordinate_resolution + 1)
        self.interruption = interruption
        self.output_dir = Path(options.output_dir)
        self.log = RunLog(self.output_dir, accelerator)
        self.checkpoints = Checkpoints(self.output_dir, options.save_total_limit, accelerator, self.log.report)
        self.progress = Progress(data_digest=data.rows.digest(), arguments=arguments.to_dict())
        self.agreement = Agreement(accelerator, interruption)
        self.place: Place | None = None  # in the data, after the last step
        self.failure: Exception | None = None  # of the rows that come next

        model.generation_config.update(**sampling_settings(arguments, model))
        optimizer, average = create_optimization(options, model, accelerator)
        self.steps = Steps(arguments, self.progress, optimizer, data.rows.rows_in_epoch, accelerator.num_processes)
        keep_less(model, options.activation_memory_budget)
        if options.torch_compile:
            compile_blocks(model, options.torch_compile_mode, memory_budget=options.activation_memory_budget)
        self.learner: Learner
        self.model, self.optimizer, self.learner = prepare(accelerator, model, optimizer, options, self.log.report)
        self.average = average
        weights = Weights(accelerator, self.model, average)
        self.writer = ModelWriter(weights, tokenizer, self.output_dir, self.progress, self.log)
        self.assessment = Assessment(weights, data, tokenizer, options, self.progress, self.agreement, self.log)
        self.results = StepResults(self.progress, self.steps, self.log, arguments.data.row_length)
        self.milestones = Milestones(
            options,
            self.progress,
            self.steps,
            self.checkpoints,
            self.writer,
            self.assessment,
            self.agreement,
            self.results,
        )

    def start(self) -> None:
        """Begin anew or go on from a checkpoint, and say what is going to happen."""
        accelerator, rows = self.accelerator, self.data.rows
        checkpoint = find_checkpoint(self.checkpoints, self.options.resume_from_checkpoint)
        if checkpoint is not None:
            resume(checkpoint, self.progress, self.steps, rows, accelerator, self.optimizer, self.log.report)
            self.milestones.saved_step = self.progress.step
        if accelerator.is_main_process:
            self.checkpoints.set_aside(-1 if checkpoint is None else self.progress.step)
        self.log.cut(self.progress.step)
        if self.options.report_to:
            self.log.start_trackers(self.progress.arguments, self.options.run_name)
        parameters = sum(parameter.numel() for parameter in self.model.parameters())
        if self.progress.step >= self.steps.last:
            self.log.report(f"step {self.progress.step} of {self.steps.last} is done: there is nothing left to train")
        self.log.report(
            f"{parameters:,} parameters; {rows.describe()} of {self.arguments.data.row_length:,} tokens; "
            f"{self.steps.describe()}; {accelerator.num_processes} x {accelerator.device.type}, precision "
            f"{accelerator.mixed_precision}"
        )

    def train(self) -> bool:
        """Train until the last step or an interruption; whether it was the former."""
        progress, steps, options = self.progress, self.steps, self.options
        batches = self.data.rows.batches(
            progress.places,
            options.per_device_train_batch_size,
            self.accelerator.process_index,
            self.accelerator.num_processes,
            self.arguments.data.dataloader_num_workers,
            pin_memory=self.accelerator.device.type == "cuda",
        )
        batches = self.noise.of(batches)
        is_silent = options.disable_tqdm or not self.accelerator.is_main_process
        bar = tqdm(total=steps.last, initial=progress.step, unit="step", disable=is_silent)
        pace, window = Window(), Window()
        self.model.train()
        batch, place = self.fetch(batches)
        labels, stop = self.agree(batch, pace)
        if progress.due:
            stop = self.milestones.catch_up(self.place, save=True) or stop
        while progress.step < steps.last and not stop:
            began = time.monotonic()
            loss = self.learner.backward(batch, labels)
            learnt, self.place = labels, place
            if progress.step + 1 < steps.last:
                # While the device is at work on this step: the rows of the next one.
                batch, place = self.fetch(batches)
                labels, stop = self.agree(batch, pace)
            found = self.update(loss)
            self.results.read()  # of the step before
            progress.step += 1
            progress.eval_loss = None
            seconds = time.monotonic() - began
            progress.seconds += seconds
            window.add(seconds, steps.rows_per_step, learnt)
            if progress.step > 2 or pace.steps:  # the first steps compile and allocate
                pace.add(seconds, steps.rows_per_step, learnt)

            line = None
            if steps.due(options.logging_steps, at_end=True):
                epoch = self.data.rows.epochs(self.place)
                line, window = Line(window, steps.schedule.get_last_lr()[0], epoch, progress.seconds), Window()
            self.results.add(StepResult(progress.step, learnt, loss, found), line)
            bar.total = steps.last
            bar.set_postfix_str(self.results.said, refresh=False)
            bar.update()
            stop = self.milestones.reach(self.place) or stop
        self.results.read()
        bar.close()
        if progress.step < steps.last or progress.due:
            self.stop()
            return False
        return True

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
        labels = sum(int((rows["labels"] != IGNORED).sum()) for rows in batch)
        last = self.steps.fitting(pace) if self.accelerator.is_main_process else 0
        asked, failed = self.interruption.asked, self.failure is not None
        labels, asked, failed, last = self.agreement.sums(labels, asked, failed, last)
        if failed and self.failure is None:
            self.failure = CommandError("another process could not read its rows; it says why")
        if last < self.progress.planned_steps == self.steps.last:
            self.log.report(
                f"a step takes {pace.seconds / pace.steps:.2g} s, so that max_minutes: {self.options.max_minutes:g} "
                f"leaves time for {last:,} of {self.steps.last:,} steps"
            )
        self.steps.end_after(last)
        return labels, asked > 0 or failed > 0

    def update(self, loss: torch.Tensor) -> torch.Tensor:
        """
        Clip the gradients and step the optimiser; where the gradient is not finite the step is left out, while the
        learning rate and the moving average go on. Returns (2,) the norm of the gradient and the loss of all
        processes, which the device may still have to compute.
        """
        found = self.learner.update(loss)
        self.steps.schedule.step()
        if self.average is not None:
            self.average.update_parameters(self.accelerator.unwrap_model(self.model))
        return found

    def stop(self) -> None:
        """Save what a later run goes on from. Raises what the rows failed with, if that is why the run stops."""
        stopped = f"stopped after step {self.progress.step} of {self.steps.last}"
        is_saved = self.milestones.save(self.place)
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
        is_best = self.options.load_best_model_at_end and self.writer.load_best(self.checkpoints)
        self.writer.publish()
        try:
            self.assessment.sample(self.output_dir)
        except Stopped:
            if not is_best:  # whose state is not that of the last step
                self.milestones.save(self.place)
            self.log.report(
                f"the model is in {self.output_dir}, without samples: --resume_from_checkpoint latest draws them"
            )
        else:
            if self.accelerator.is_main_process and self.options.num_samples:
                self.writer.add_to_card(["samples.png"])
            self.log.report(f"the model is in {self.output_dir}")
        learnt = True
        if self.accelerator.is_main_process:
            learnt = report_outcome(self.writer.record(), self.log, can_resume=bool(self.options.save_steps))
        return all(gather_object([learnt]))


if __name__ == "__main__":
    sys.exit(record(main)())  # a process that fails tells the launcher, which names it and ends the others
