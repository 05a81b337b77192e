"""
Train iFlame with Accelerate.

    accelerate launch training/train.py [config.yaml] [--option value ...]
    python training/train.py --help

Without arguments a small model learns meshes of furniture and buildings that are generated on the spot.
"""

import math
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import asdict
from itertools import islice
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file, this module must find its siblings

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, gather_object, set_seed
from safetensors.torch import load_file, save_file
from torch.distributed.elastic.multiprocessing.errors import record
from torch.distributed.tensor import DTensor
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm
from transformers.utils.logging import disable_progress_bar

from iflame_cli.errors import CommandError
from iflame_hf import IFlameForCausalLM, IFlameTokenizer
from training.arguments import Arguments, parse_arguments
from training.measure.metrics import evaluate
from training.measure.samples import draw_samples
from training.optim.average import create_average
from training.optim.groups import create_optimizer
from training.optim.schedule import learning_rate_curve
from training.rows.load import Batch, Place
from training.rows.map import Data, load_data
from training.rows.pack import IGNORED
from training.run.card import RunRecord, model_card
from training.run.checkpoint import Checkpoints, Interruption, Progress, Stopped
from training.run.create import compile_blocks, create_accelerator, create_model
from training.run.ending import ends_in_words
from training.run.log import RunLog, Window, write_whole
from training.run.resume import (
    OF_THE_OPTIMISER,
    apply_settings,
    check_folder,
    check_options,
    lock,
    rows_of_a_step,
    settings_of,
)

WEIGHTS = "model.safetensors"
AVERAGE = "average.safetensors"
# Steps whose gradient is not finite are left out; so many in a row, or all there are, end the run.
MOST_STEPS_LEFT_OUT = 10
# Steps before the speed of a machine is taken for known.
STEPS_TO_MEASURE = 20


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
    with ExitStack() as stack:
        failure = None
        if accelerator.is_main_process:
            try:
                stack.enter_context(lock(Path(arguments.train.output_dir)))
            except (OSError, ValueError) as error:
                failure = error
        if (failure := next(filter(None, gather_object([failure])), None)) is not None:
            raise failure
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
        self.tokenizer = tokenizer
        self.data = data
        self.interruption = interruption
        self.output_dir = Path(options.output_dir)
        self.log = RunLog(self.output_dir, accelerator)
        self.checkpoints = Checkpoints(self.output_dir, options.save_total_limit, accelerator, self.log.report)
        self.progress = Progress(data_digest=data.rows.digest(), arguments=arguments.to_dict())
        self.saved_step: int | None = None
        self.published_step: int | None = None  # if it is not the last one
        self.place: Place | None = None  # in the data, behind the last step
        self.bar: tqdm | None = None
        self.failure: Exception | None = None  # of the rows that come next

        # With these settings the model is sampled here, and by whoever loads it.
        model.generation_config.update(
            do_sample=True, temperature=options.temperature, top_k=options.top_k, top_p=options.top_p
        )
        accumulated = options.per_device_train_batch_size * options.gradient_accumulation_steps
        self.rows_per_step = accumulated * accelerator.num_processes
        if options.max_steps > 0:
            self.progress.planned_steps = options.max_steps
        else:
            rows = options.num_train_epochs * data.rows.rows_in_epoch
            self.progress.planned_steps = max(1, round(rows / self.rows_per_step))
        self.max_steps = self.progress.planned_steps

        self.average = None
        if options.ema_decay is not None and self.sharded:
            raise ValueError(
                "ema_decay is not available while the weights are sharded (FSDP): leave it out, or use DDP"
            )
        if options.ema_decay is not None:
            self.average = create_average(model, options.ema_decay, accelerator.device)
        optimizer = create_optimizer(
            model,
            options.optim,
            options.learning_rate,
            options.weight_decay,
            (options.adam_beta1, options.adam_beta2),
            options.adam_epsilon,
        )
        self.schedule = LambdaLR(optimizer, self.learning_rate_curve())
        if options.torch_compile:
            compile_blocks(model, options.torch_compile_mode)
        self.model, self.optimizer = accelerator.prepare(model, optimizer)
        accelerator.register_save_state_pre_hook(lambda models, weights, folder: weights.clear())
        accelerator.register_load_state_pre_hook(self.load_weights)

    @property
    def sharded(self) -> bool:
        """Whether every process has a part of the weights only."""
        return self.accelerator.distributed_type == DistributedType.FSDP

    def learning_rate_curve(self) -> Callable[[int], float]:
        options = self.options
        return learning_rate_curve(
            options.lr_scheduler_type, options.warmup_steps, self.max_steps, self.arguments.schedule_kwargs()
        )

    def start(self) -> None:
        """Begin anew or go on from a checkpoint, and say what is going to happen."""
        accelerator, wanted = self.accelerator, self.options.resume_from_checkpoint
        if accelerator.is_main_process:
            self.checkpoints.clean()
        accelerator.wait_for_everyone()
        checkpoint = None if wanted is None else self.checkpoints.find(wanted)
        if checkpoint is None:
            check_folder(self.output_dir, bool(self.checkpoints.folders()), may_go_on=wanted is not None)
        accelerator.wait_for_everyone()  # all have looked at the folder
        if checkpoint is not None:
            self.resume(checkpoint)
        if accelerator.is_main_process:
            self.checkpoints.set_aside(-1 if checkpoint is None else self.progress.step)
        self.log.cut(self.progress.step)
        if self.options.report_to:
            settings = {name: str(value) for name, value in self.progress.arguments.items()}
            names = {"wandb": {"name": self.options.run_name}} if self.options.run_name else {}
            accelerator.init_trackers("iflame", config=settings, init_kwargs=names)
        parameters = sum(parameter.numel() for parameter in self.model.parameters())
        if self.progress.step >= self.max_steps:
            self.log.report(f"step {self.progress.step} of {self.max_steps} is done: there is nothing left to train")
        rows, steps = self.data.rows.rows_in_epoch, f"{self.max_steps:,} steps of {self.rows_per_step} rows"
        if rows is not None:
            steps += f", {self.max_steps * self.rows_per_step / rows:.1f} epochs"
        self.log.report(
            f"{parameters:,} parameters; {self.data.rows.describe()} of {self.arguments.data.row_length:,} tokens; "
            f"{steps}; {accelerator.num_processes} x {accelerator.device.type}, precision "
            f"{accelerator.mixed_precision}"
        )

    def resume(self, checkpoint: Path) -> None:
        """Restore everything that a checkpoint holds. Raises ValueError if it belongs to other data."""
        saved = Progress.read(checkpoint)
        if saved.data_digest != self.progress.data_digest:
            raise ValueError(
                f"{checkpoint} belongs to other training data, or to another --row_length, --seed, --long_meshes, "
                "--balance or --streaming, so that its place in the data means nothing here. Give the same options, "
                f"or start a new run from its weights with --model_name_or_path {checkpoint} and another --output_dir"
            )
        arguments, options = self.progress.arguments, self.options
        check_options(checkpoint, saved.arguments, arguments)
        changed = {name for name, value in saved.arguments.items() if arguments.get(name) != value}
        if saved.max_steps and not changed & {"max_steps", "num_train_epochs", "max_minutes"}:
            self.set_max_steps(saved.max_steps)
        if options.max_steps < 0 and rows_of_a_step(saved) not in (0, self.rows_per_step):
            epochs = options.num_train_epochs - max(map(self.data.rows.epochs, saved.places))
            left = max(0, round(epochs * self.data.rows.rows_in_epoch / self.rows_per_step))
            self.progress.planned_steps = saved.step + left
            self.set_max_steps(self.progress.planned_steps)
        saved.arguments = arguments
        saved.max_steps, saved.planned_steps = self.progress.max_steps, self.progress.planned_steps
        settings = settings_of(self.optimizer)
        self.accelerator.load_state(str(checkpoint))
        self.schedule.load_state_dict(saved.scheduler)
        if changed & OF_THE_OPTIMISER:
            apply_settings(self.optimizer, self.schedule, settings)
        self.progress = saved
        self.saved_step = saved.step
        changed -= {"resume_from_checkpoint"}
        self.log.report(
            f"resumed from {checkpoint}" + (f" with other {', '.join(sorted(changed))}" if changed else "")
        )

    def load_weights(self, models: list[torch.nn.Module], folder: str) -> None:
        """Called by Accelerate, which still loads the weights itself where they are sharded."""
        if models:
            self.accelerator.unwrap_model(self.model).load_state_dict(load_file(Path(folder) / WEIGHTS))
            models.clear()
        if self.average is not None:
            self.average.load_state_dict(load_file(Path(folder) / AVERAGE))

    def train(self) -> bool:
        """Train until the last step or an interruption; whether it was the former."""
        progress, options = self.progress, self.options
        batches = self.data.rows.batches(
            progress.places,
            options.per_device_train_batch_size,
            self.accelerator.process_index,
            self.accelerator.num_processes,
            self.arguments.data.dataloader_num_workers,
            pin_memory=self.accelerator.device.type == "cuda",
        )
        self.bar = tqdm(
            total=self.max_steps,
            initial=progress.step,
            unit="step",
            disable=options.disable_tqdm or not self.accelerator.is_main_process,
        )
        pace, window = Window(), Window()
        left_out = 0
        self.model.train()
        batch, place = self.fetch(batches)
        labels, stop = self.agree(batch, pace)
        if progress.due:
            stop = self.end_step(save=True) or stop
        while progress.step < self.max_steps and not stop:
            began = time.monotonic()
            loss = self.backward(batch, labels)
            learnt, self.place = labels, place
            if progress.step + 1 < self.max_steps:
                # While the device is at work on this step: the rows of the next one.
                batch, place = self.fetch(batches)
                labels, stop = self.agree(batch, pace)
            loss, gradient_norm = self.update(loss)
            left_out = 0 if gradient_norm is not None else left_out + 1
            if left_out >= min(MOST_STEPS_LEFT_OUT, self.max_steps):
                advice = "lower --learning_rate, or train in bf16 instead of fp16"
                if learnt == 0:
                    advice = "not one mesh of their rows could be used, as the warnings above say"
                raise CommandError(f"the gradient was not finite in {left_out} steps in a row: {advice}")
            if gradient_norm is not None:
                progress.loss_sum += loss
                progress.loss_steps += 1
                progress.labels += learnt
            progress.step += 1
            progress.eval_loss = None
            seconds = time.monotonic() - began
            progress.seconds += seconds
            window.add(seconds, self.rows_per_step, learnt)
            if progress.step > 2 or pace.steps:  # the first steps compile and allocate
                pace.add(seconds, self.rows_per_step, learnt)

            if self.due(options.logging_steps, at_end=True) and progress.loss_steps:
                self.log_loss(gradient_norm, window)
                window = Window()
            self.bar.update()
            if self.due(options.eval_steps or options.save_steps, at_end=True):
                progress.due.append("evaluation")
            if self.due(options.sample_steps, at_end=False):
                progress.due.append("samples")
            stop = self.end_step(save=self.due(options.save_steps, at_end=options.save_steps > 0)) or stop
        self.bar.close()
        if progress.step < self.max_steps or progress.due:
            stopped = f"stopped after step {progress.step} of {self.max_steps}"
            is_saved = self.save()
            if self.failure is not None:
                raise self.failure
            if not is_saved:
                raise CommandError(f"{stopped}, which could not be saved: the checkpoints before it are what is left")
            self.log.report(f"{stopped}; --resume_from_checkpoint latest goes on")
            return False
        return True

    def end_step(self, save: bool) -> bool:
        """Evaluate, sample and save as is due after a step; whether the run was asked to stop meanwhile."""
        due = self.progress.due
        if not due and not save:
            return False
        try:
            while due:
                if due[0] == "evaluation":
                    self.evaluate()
                else:
                    self.sample(self.output_dir / f"samples-{self.progress.step}")
                due.pop(0)
                self.saved_step = None  # where a checkpoint says that this is still to be done
            if save:
                self.save()
            self.check()
        except Stopped:
            return True
        return False

    def check(self, done: bool = False) -> bool:
        """
        Called on all processes together: whether any is done with what the others wait for. Raises Stopped if none is,
        and any was asked to stop.
        """
        asked, done = self.sums(self.interruption.asked, done)
        if asked and not done:
            raise Stopped
        return done > 0

    def sums(self, *numbers: int) -> list[int]:
        """The sum of each number over all processes, in one collective. With one process no device is asked."""
        if self.accelerator.num_processes == 1:
            return [int(number) for number in numbers]
        numbers = torch.tensor(numbers, dtype=torch.long, device=self.accelerator.device)
        return self.accelerator.reduce(numbers, "sum").tolist()

    def fetch(self, batches: Iterator[tuple[Batch, Place]]) -> tuple[list[Batch], Place]:
        """
        This process's rows of one step, as often as gradients are accumulated, and the place behind them. Rows that
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
        max_steps, planned = self.max_steps, self.progress.planned_steps
        minutes = self.options.max_minutes
        if minutes is not None and pace.steps and pace.steps % STEPS_TO_MEASURE == 0:
            left = max(0.0, 60 * minutes - self.progress.seconds) / (pace.seconds / pace.steps)
            fitting = min(planned, self.progress.step + max(1, int(left)))
            if abs(fitting - max_steps) > 0.02 * max_steps:
                max_steps = fitting
        labels = sum(int((rows["labels"] != IGNORED).sum()) for rows in batch)
        main = self.accelerator.is_main_process
        asked, failed = self.interruption.asked, self.failure is not None
        labels, asked, failed, max_steps = self.sums(labels, asked, failed, max_steps if main else 0)
        if failed and self.failure is None:
            self.failure = CommandError("another process could not read its rows; it says why")
        if max_steps < planned == self.max_steps:
            self.log.report(
                f"a step takes {pace.seconds / pace.steps:.2g} s, so that max_minutes: {minutes:g} leaves time for "
                f"{max_steps:,} of {planned:,} steps"
            )
        self.set_max_steps(max_steps)
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
            rows = {name: tensor.to(device, non_blocking=True) for name, tensor in rows.items()}
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
        if isinstance(norm, DTensor):  # of weights that are sharded
            norm = norm.full_tensor()
        total = accelerator.reduce(loss, "sum")
        norm, total = torch.stack([norm.to(total.device), total]).tolist()  # the step's one wait for the device
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
        self.schedule.step()
        if self.average is not None:
            self.average.update_parameters(accelerator.unwrap_model(self.model))
        return total, norm

    def set_max_steps(self, max_steps: int) -> None:
        """Let the run, its schedule and its progress bar end at another step."""
        if max_steps == self.max_steps:
            return
        self.max_steps = max_steps
        self.progress.max_steps = max_steps
        self.schedule.lr_lambdas = [self.learning_rate_curve()] * len(self.schedule.lr_lambdas)
        if self.bar is not None:
            self.bar.total = max_steps

    def due(self, every: int, at_end: bool) -> bool:
        step = self.progress.step
        return bool(every) and step % every == 0 or at_end and step == self.max_steps

    def evaluate(self) -> None:
        if self.data.validation is None:
            return
        metrics = evaluate(
            self.model if self.average is None else self.average.module,
            self.data.validation_loader,
            self.accelerator,
            self.data.validation.category_names,
            self.tokenizer.coordinate_resolution + 1,
            self.check,
        )
        self.progress.eval_loss = metrics["eval_loss"]
        self.log.write(self.progress.step, metrics)
        self.log.report(
            f"step {self.progress.step}: evaluation loss {metrics['eval_loss']:.4f}, accuracy of tokens "
            f"{metrics['eval_token_accuracy']:.1%}, vertices {metrics['eval_vertex_accuracy']:.1%}, faces "
            f"{metrics['eval_face_accuracy']:.1%}"
        )

    def sample(self, folder: Path) -> None:
        """Generate meshes, on the main process."""
        options = self.options
        if options.num_samples == 0:
            return
        weights = self.accelerator.get_state_dict(self.model) if self.sharded else None
        if self.accelerator.is_main_process:
            if self.average is not None:
                model = self.average.module
            elif weights is None:
                model = self.accelerator.unwrap_model(self.model)
            else:
                model = IFlameForCausalLM(self.accelerator.unwrap_model(self.model).config)
                model.load_state_dict(weights)
                model.to(self.accelerator.device)
            samples = draw_samples(
                model,
                self.tokenizer,
                self.accelerator,
                folder,
                options.num_samples,
                options.sample_max_faces,
                options.seed,
                options.temperature,
                options.top_k,
                options.top_p,
                self.check,
            )
            self.check(done=True)
            ended = sum(sample["ended"] for sample in samples)
            self.log.write(
                self.progress.step,
                {"samples": str(folder), "samples_ended": ended, "sample_faces": [x["faces"] for x in samples]},
            )
            self.log.report(f"{len(samples)} samples, {ended} of them complete: {folder / 'samples.png'}")
        else:
            while not self.check():
                pass

    def save(self) -> bool:
        """Save a checkpoint, unless this very step has one; whether it has one now."""
        if self.saved_step == self.progress.step:
            return True
        self.progress.scheduler = self.schedule.state_dict()
        if self.place is not None:
            self.progress.places = gather_object([self.place])
        if self.checkpoints.save(self.progress.step, self.write_checkpoint):
            self.saved_step = self.progress.step
        return self.saved_step == self.progress.step

    def write_checkpoint(self, folder: Path) -> None:
        """Called on every process: a folder that resumes this run and is a model that `from_pretrained` loads."""
        self.accelerator.save_state(str(folder))
        self.write_model(folder, self.accelerator.get_state_dict(self.model))
        if self.accelerator.is_main_process:
            if self.average is not None:
                save_file(self.average.state_dict(), folder / AVERAGE)
            self.progress.write(folder)

    def write_model(self, folder: Path, weights: dict[str, torch.Tensor]) -> None:
        if self.accelerator.is_main_process:
            model = self.accelerator.unwrap_model(self.model)
            if self.sharded:  # its class is one that torch has made, which nobody could load
                generation_config = model.generation_config
                with torch.device("meta"):
                    model = IFlameForCausalLM(model.config)
                model.generation_config = generation_config
            model.save_pretrained(folder, state_dict=weights)
            self.tokenizer.save_pretrained(folder)
            self.write_card(model, folder)

    def run_record(self) -> RunRecord:
        """What this run knows of the model that it publishes."""
        evaluation = self.log.evaluation(self.published_step or self.progress.step)
        return RunRecord(progress=asdict(self.progress), evaluation=evaluation)

    def write_card(self, model: IFlameForCausalLM, folder: Path, samples: Sequence[str] = ()) -> None:
        """The page that the Hub shows of a model, with what this run knows; hub_upload.py writes a fuller one."""
        card = model_card(model, self.run_record(), repo_id=str(self.output_dir), samples=samples)
        write_whole(folder / "README.md", str(card).encode())

    def finish(self) -> bool:
        """
        Leave the finished model with its tokenizer in the output folder, and samples of it. Returns whether it has
        learnt what required_eval_loss asks for, on every process.
        """
        best = self.checkpoints.best() if self.options.load_best_model_at_end else None
        if best is not None:
            self.log.report(f"the checkpoint with the lowest evaluation loss is {best}")
            self.accelerator.load_state(str(best))
            self.published_step = Progress.read(best).step
        elif self.options.load_best_model_at_end:
            self.log.report("no checkpoint was evaluated: the model of the last step is published")
        weights = self.accelerator.get_state_dict(self.model if self.average is None else self.average.module)
        if self.accelerator.is_main_process:
            with tempfile.TemporaryDirectory(dir=self.output_dir, prefix=".model-") as beside:
                self.write_model(Path(beside), weights)
                for path in Path(beside).iterdir():
                    os.replace(path, self.output_dir / path.name)
        try:
            self.sample(self.output_dir)
        except Stopped:
            if best is None:
                self.save()
            self.log.report(
                f"the model is in {self.output_dir}, without samples: --resume_from_checkpoint latest draws them"
            )
            return self.report_shortfall()
        if self.accelerator.is_main_process and self.options.num_samples:
            self.write_card(self.accelerator.unwrap_model(self.model), self.output_dir, ["samples.png"])
        self.log.report(f"the model is in {self.output_dir}")
        return self.report_shortfall()

    def report_shortfall(self) -> bool:
        """Tell what the run lacks at its end, and how it gets there. Returns what `finish` does."""
        missed = False
        if self.accelerator.is_main_process:
            run = self.run_record()
            missed, shortfall = run.missed_loss, run.shortfall()
            if shortfall:
                self.log.report(shortfall)
                self.log.write(self.progress.step, {"ended": shortfall, "planned_steps": self.progress.planned_steps})
            if missed:
                option = "--max_minutes" if run.shortened else "--max_steps"
                resume = ", and --resume_from_checkpoint latest to go on from here" if self.options.save_steps else ""
                self.log.report(
                    f"its samples show meshes that it has not learnt: give the run a larger {option}{resume}"
                )
        return not any(gather_object([missed]))

    def log_loss(self, gradient_norm: float | None, window: Window) -> None:
        """A line on training: the mean loss since the line before, and the speed of these steps."""
        progress, length = self.progress, self.arguments.data.row_length
        loss = progress.loss_sum / progress.loss_steps
        progress.loss_sum, progress.loss_steps = 0.0, 0
        speed = window.rows * length / window.seconds
        memory = {}
        if self.accelerator.device.type == "cuda":  # the most that this process's tensors have taken so far
            memory["memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
        self.log.write(
            self.progress.step,
            {
                "loss": loss,
                "grad_norm": gradient_norm,
                "learning_rate": self.schedule.get_last_lr()[0],
                "epoch": self.data.rows.epochs(self.place),
                "tokens_per_second": speed,
                "useful_tokens_per_second": window.labels / window.seconds,
                "labels": progress.labels,
                "minutes": progress.seconds / 60,
                **memory,
            },
        )
        if self.bar is not None:
            self.bar.set_postfix_str(f"loss {loss:.4f}, {speed:,.0f} tokens/s")


if __name__ == "__main__":
    sys.exit(record(main)())  # a process that fails tells the launcher, which names it and ends the others
