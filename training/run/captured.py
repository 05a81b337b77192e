"""
Steps as CUDA graphs: the host asks for a whole step at once, and the GPU works without waiting for it.

A graph does the same each time, on memory that stays where it is, and so everything that changes from step to step is
a tensor: rows are copied to where the graph reads them, learning rates too, gradients lie in one buffer. Rows of one
length have one shape; how many meshes they hold is rounded up, so that few graphs serve all batches.
"""

from collections.abc import Callable, Hashable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from torch import nn

from iflame_cli.errors import CommandError
from iflame_hf import IFlameConfig, IFlameForCausalLM
from iflame_hf.implementations_iflame import LinearAttentionCall, choose_linear_attention
from iflame_hf.layout_iflame import RowLayout
from iflame_hf.packed_attention_iflame import has_flash
from training.arguments import TrainArguments
from training.rows.load import Batch
from training.run.create import device_leaves_out_steps, is_compiled
from training.run.weights import are_sharded, why_never_whole
from training.run.working import WorkingWeights

# Packed rows have room for so many meshes at least.
LEAST_MESHES = 32
# Packages that are told on the host how long a mesh may be, and read everything else on the device.
FLASH_PACKAGES = ("flash_attention_2", "flash_attention_4")
# torch.compile makes graphs of its own in these modes.
MODES_WITH_GRAPHS = ("reduce-overhead", "max-autotune")


def why_not_captured(model: IFlameForCausalLM, options: TrainArguments, accelerator: Accelerator) -> str | None:
    """Why the steps of a run cannot be CUDA graphs, or None."""
    if not device_leaves_out_steps(accelerator):
        return "a gradient scaler"
    if are_sharded(accelerator) and (reason := why_never_whole(accelerator)):
        return reason
    if options.torch_compile and options.torch_compile_mode in MODES_WITH_GRAPHS:
        return f"torch_compile_mode={options.torch_compile_mode}"
    dtype = torch.bfloat16 if accelerator.mixed_precision == "bf16" else torch.float32
    return why_no_graph(model.config, accelerator.device, dtype)


def why_no_graph(config: IFlameConfig, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the gradients of such a model, with products in such a type, cannot be a CUDA graph, or None."""
    if device.type != "cuda" or torch.version.hip:
        return f"the device {device.type}"
    attention = config._attn_implementation
    if attention not in ("sdpa", *FLASH_PACKAGES):
        return f"attn_implementation={attention!r}"
    if dtype == torch.float32:
        return "attention of packed rows, which needs --bf16"
    if attention == "sdpa":
        if not has_flash(device, dtype, config.head_dim) or not torch.backends.cuda.flash_sdp_enabled():
            return "attention of packed rows, which needs torch's flash attention"
    call = LinearAttentionCall(device.type, config.head_dim, length=2)
    linear = choose_linear_attention(config.linear_attn_implementation, call)
    return None if linear in ("triton", "chunked") else f"linear_attn_implementation={linear!r}"


class CapturedLearner:
    """
    A learner (`training.run.learner.Learner`) on a GPU. What is done for the first time is run as it is, is captured
    when it comes again, and replayed from then on. Graphs share their memory.

    Args:
        model: whose trainable parameters are all on one device, and which takes a mesh as long as a row. Gradients
            belong to this object: nobody sets them to None. What is frozen stays so. Hooks of single parameters are
            not called for all of them.
        optimizer: whose `found_inf` leaves out steps. Its learning rates may be changed between steps; its state and
            everything else stay as they are once there was a step.
        max_grad_norm: infinite: gradients are not clipped.
        autocast: makes the context of the forward pass.
        num_processes: that learn together, each on its GPU; they begin with the weights of the first.
        captures: else steps are run as they are each time.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        max_grad_norm: float,
        autocast: Callable[[], AbstractContextManager],
        num_processes: int = 1,
        captures: bool = True,
    ):
        self.model, self.optimizer, self.max_grad_norm, self.autocast = model, optimizer, max_grad_norm, autocast
        self.num_processes, self.captures = num_processes, captures
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.device = device = parameters[0].device
        if num_processes > 1:
            broadcast([parameter.data for parameter in parameters])
        # Compiled blocks copy their weights themselves.
        dtype = None if any(is_compiled(module) for module in model.modules()) else _autocasts_dtype(autocast, device)
        self.working = WorkingWeights(model, dtype)
        # All gradients, and at the end the loss: what processes add up goes from one to the other in one piece.
        self.sums = self.working.gradients.sums
        self.gradients, self.loss = self.sums[:-1], self.sums[-1]
        self.num_items = torch.zeros((), dtype=torch.long, device=device)
        self.rates = [torch.zeros((), device=device) for _ in optimizer.param_groups]
        self._rows: dict[Hashable, Batch] = {}
        self._graphs: dict[Hashable, tuple[torch.cuda.CUDAGraph, torch.Tensor]] = {}
        self._warm: set[Hashable] = set()  # what has been run
        self._pool = self._stream = None

    def backward(self, batch: list[Batch], labels: int) -> torch.Tensor:
        if self.working.gradients.was_taken_away():
            raise RuntimeError("gradients were taken away from a CapturedLearner, such as by optimizer.zero_grad()")
        if self.working.were_moved():
            raise RuntimeError("weights that a CapturedLearner trains may change, but not move to other memory")
        total = torch.zeros((), device=self.device)
        self.num_items.fill_(labels)
        self._run("refresh", "refresh", self._refresh)
        for rows in batch:
            rows = with_rounded_room(rows)
            kind = kind_of(rows)
            total += self._run(kind, kind._replace(meshes=None), self._learn, self._in_place(kind, rows))
        return total

    def update(self, loss: torch.Tensor) -> torch.Tensor:
        self.loss.copy_(loss)
        if self.num_processes > 1:
            torch.distributed.all_reduce(self.sums)
        for rate, group in zip(self.rates, self.optimizer.param_groups, strict=True):
            rate.fill_(group["lr"])
        return self._run("update", "update", self._step)

    def _refresh(self) -> torch.Tensor:
        self.working.refresh()
        return self.loss

    def _learn(self, rows: Batch) -> torch.Tensor:
        with self.working.attached():
            with self.autocast():
                loss = self.model(**rows, use_cache=False, num_items_in_batch=self.num_items).loss
            loss.backward()
        return loss.detach()

    def _step(self) -> torch.Tensor:
        norm = torch.linalg.vector_norm(self.gradients)
        found = torch.stack([norm, self.loss])
        # As torch.nn.utils.clip_grad_norm_.
        self.gradients.mul_((self.max_grad_norm / (norm + 1e-6)).clamp(max=1.0))
        self.optimizer.found_inf = (~found.isfinite().all()).float()
        with self._rates_of_now():
            self.optimizer.step()
        self.sums.zero_()
        return found

    @contextmanager
    def _rates_of_now(self) -> Iterator[None]:
        """Within it the optimiser reads its learning rates on the device."""
        groups = self.optimizer.param_groups
        own = [{name: group[name] for name in ("lr", "capturable") if name in group} for group in groups]
        for group, rate in zip(groups, self.rates, strict=True):
            group["lr"] = rate
            if "capturable" in group:
                group["capturable"] = self.device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        try:
            yield
        finally:
            for group, values in zip(groups, own, strict=True):
                group.update(values)

    def _in_place(self, kind: Hashable, rows: Batch) -> Batch:
        """The rows where a graph of their kind reads them."""
        if not self.captures:
            return _with_tensors(rows, [each.to(self.device, non_blocking=True) for each in _tensors(rows)])
        if kind not in self._rows:
            static = _with_tensors(rows, [each.to(self.device, copy=True) for each in _tensors(rows)])
            if static["layout"] is not None:
                # Whoever reads of one batch on the host, where a graph would do the same for every other, fails.
                unknown = torch.full_like(static["layout"].offsets_on_host, -1)
                static["layout"] = replace(static["layout"], offsets_on_host=unknown)
            self._rows[kind] = static
            return static
        for place, values in zip(_tensors(self._rows[kind]), _tensors(rows), strict=True):
            place.copy_(values, non_blocking=True)
        return self._rows[kind]

    def _run(
        self, kind: Hashable, family: Hashable, function: Callable[..., torch.Tensor], *arguments: Any
    ) -> torch.Tensor:
        """
        What a function returns, in memory that its next call may overwrite.

        Args:
            family: kinds that take the same kernels, which are compiled and loaded once one of them was run.
        """
        if not self.captures or family not in self._warm:
            self._warm.add(family)
            return function(*arguments)
        if kind not in self._graphs:
            self._graphs[kind] = self._captured(function, *arguments)
        graph, output = self._graphs[kind]
        graph.replay()
        return output

    def _captured(self, function: Callable[..., torch.Tensor], *arguments: Any):
        torch.cuda.synchronize(self.device)
        torch.cuda.empty_cache()  # what steps held that were no graphs: a graph has memory of its own
        if self._pool is None:
            # Graphs share memory only where they are captured on the same stream.
            self._pool, self._stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream(self.device)
        graph = torch.cuda.CUDAGraph()
        try:
            # Other threads, such as the one that pins memory for the next rows, may do what they like.
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                output = function(*arguments)
        except RuntimeError as error:  # which may leave torch, its allocator and its streams, in the middle of it
            reason = str(error).strip().partition("\n")[0]
            raise CommandError(
                f"a step cannot be a CUDA graph: {reason}; with --cuda_graphs False the run goes on from its last "
                "checkpoint without"
            ) from error
        return graph, output


def _autocasts_dtype(autocast: Callable[[], AbstractContextManager], device: torch.device) -> torch.dtype | None:
    """What products are in within autocast, or None where that is off."""
    with autocast():
        return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None


class Kind(NamedTuple):
    """Rows of one kind are learnt from by the same graph."""

    shape: torch.Size  # of the ids
    meshes: int | None  # for which a layout has room
    is_packed: bool
    attributes: tuple[str, ...] = ()  # what is known of each mesh


def with_rounded_room(rows: Batch) -> Batch:
    """
    Rows whose layout is one of few: with room for a power of two of meshes if packed.

    Raises:
        ValueError: for inputs that a graph would not be given, and a layout that says nothing on the host.
    """
    if others := rows.keys() - {"input_ids", "labels", "layout"}:
        raise ValueError(
            f"rows are learnt from by input_ids, labels and layout alone, got {', '.join(sorted(others))}"
        )
    layout = rows.get("layout")
    if layout is None:
        return rows
    if layout.num_meshes is None:
        raise ValueError("a layout must be made on the CPU, by who packs the rows")
    if layout.num_meshes != layout.shape[0]:
        layout = layout.with_room(max(LEAST_MESHES, 1 << (layout.num_meshes - 1).bit_length()))
        if layout.offsets.device.type == "cpu" and torch.cuda.is_available():
            layout = layout.pin_memory()
    return {**rows, "layout": layout}


def kind_of(rows: Batch) -> Kind:
    shape, layout = rows["input_ids"].shape, rows.get("layout")
    meshes = None if layout is None else layout.num_meshes
    attributes = () if layout is None else tuple(sorted(layout.attributes))
    return Kind(shape, meshes, meshes not in (None, shape[0]), attributes)


_OF_LAYOUT = ("face_positions", "face_meshes", "offsets")


def _tensors(rows: Batch) -> list[torch.Tensor]:
    """All that differs from batch to batch, in one order."""
    layout: RowLayout | None = rows.get("layout")
    of_layout = [] if layout is None else [getattr(layout, name) for name in _OF_LAYOUT]
    attributes = {} if layout is None else layout.attributes
    return [rows["input_ids"], rows["labels"], *of_layout, *(attributes[name] for name in sorted(attributes))]


def _with_tensors(rows: Batch, tensors: list[torch.Tensor]) -> Batch:
    input_ids, labels, *of_layout = tensors
    layout: RowLayout | None = rows.get("layout")
    if layout is not None:
        names = (*_OF_LAYOUT, *sorted(layout.attributes))
        moved = dict(zip(names, of_layout, strict=True))
        attributes = {name: moved.pop(name) for name in layout.attributes}
        layout = replace(layout, **moved, attributes=attributes)
    return {"input_ids": input_ids, "labels": labels, "layout": layout}
