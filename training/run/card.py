"""The page of a model on the Hugging Face Hub: README.md with metadata, from what a run left in its folder."""

import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers import PreTrainedModel

from iflame_hf.format_iflame import known_format

# What train.py writes; its own modules need packages that publishing does not.
STATE = "trainer_state.json"
LOG = "log.jsonl"
# The nearest of the Hub's tasks: none is for 3D from nothing, and a model without a task passes for a text generator.
PIPELINE_TAG = "text-to-3d"
METRICS = {
    "loss": "loss, nats a token",
    "perplexity": "perplexity",
    "token_accuracy": "coordinates right",
    "vertex_accuracy": "vertices right",
    "face_accuracy": "faces right",
}
# Share of its steps that a shortened run must have done to pass for converged, where it says nothing of its loss.
ENOUGH_STEPS = 0.5
PROCEDURAL = "procedural meshes of furniture and buildings"
CITATION = """\
@article{wang2025iflame,
  title   = {iFlame: Interleaving Full and Linear Attention for Efficient Mesh Generation},
  author  = {Wang, Hanxiao and Zhang, Biao and Quan, Weize and Yan, Dong-Ming and Wonka, Peter},
  journal = {arXiv preprint arXiv:2503.16653},
  year    = {2025}
}"""
# In Jinja2, as ModelCard.from_template takes it.
CARD_TEMPLATE = """\
---
{{ card_data }}
---

# {{ name }}

An [iFlame](https://arxiv.org/abs/2503.16653) model: it generates triangle meshes, coordinate by coordinate, from
nothing or from a part of a mesh. It takes no text.

{{ "{:,}".format(parameters) }} parameters;
{{ config.num_hidden_layers }} blocks of {{ config.hidden_size }} channels over coordinates, vertices and faces,
with linear and full attention; {{ config.coordinate_resolution + 1 }} levels of each coordinate.

{% if "samples.png" in samples -%}
![Meshes that the model generated](samples.png)

{% endif -%}
{% if number_of_sample_meshes -%}
The folder `samples` holds {{ number_of_sample_meshes }} generated meshes as glb files.

{% endif -%}
## Use

```bash
pip install torch "transformers>=5.17,<6" trimesh
```

```python
{{ usage }}
```

Or, with seeds, files that other programs open, and faces as they come (`generator.stream()`):

```python
{{ pipeline }}
```

To complete a part of a mesh: `generator("part.obj", room_above=1.0)`, where the whole may become twice as high as the
part. A part of a generated mesh keeps its place without `room_above`. A mesh is generated from its lowest vertex
upwards, so that what is added lies above.

{% if asking -%}
## Asking for something

{{ asking }}

{% endif -%}
{% if evaluation -%}
## Evaluation

On held-out {{ judged_on }}, every token predicted from the true ones before it:

| |{% for title in metrics.values() %} {{ title }} |{% endfor %}
|---|{% for metric in metrics %}---|{% endfor %}
{% for row, values in evaluation.items() -%}
| {{ row }} |{% for metric in metrics %} {{ "%.4g" % values[metric] if metric in values }} |{% endfor %}
{% endfor %}
{% endif -%}
{% if training -%}
## Training

{{ training | join("\n\n") }}

{% endif -%}
## Licence

{{ "The weights: %s." % license if license else "The licence of the weights has not been stated." }}
The code, `*_iflame.py`: MIT.

## Citation

```bibtex
{{ citation }}
```

"""  # Jinja2 takes the last newline away


@dataclass
class RunRecord:
    """What the folder of a run tells of it; all empty for a model that comes from elsewhere."""

    metadata: dict[str, Any] = field(default_factory=dict)  # of the README.md in it
    progress: dict[str, Any] = field(default_factory=dict)  # of its latest checkpoint
    evaluation: dict[str, Any] = field(default_factory=dict)  # of the weights in it

    @property
    def arguments(self) -> dict[str, Any]:
        return self.progress.get("arguments", {})

    @property
    def shortened(self) -> bool:
        """Whether max_minutes ended the run before it had done its steps."""
        step, planned = self.progress.get("step", 0), self.progress.get("planned_steps", 0)
        return 0 < self.progress.get("max_steps", 0) <= step < planned

    @property
    def missed_loss(self) -> bool:
        """Whether the run has come to its end, and not to required_eval_loss."""
        required, loss = self.arguments.get("required_eval_loss"), self.evaluation.get("eval_loss", float("nan"))
        ended = self.shortened or self.progress.get("step", 0) >= self.progress.get("planned_steps", 0)
        return ended and required is not None and not loss <= required

    def shortfall(self) -> str:
        """What the run lacks at its end, in words; empty if that is nothing, or if the run goes on."""
        parts, converged = [], not self.missed_loss
        if self.shortened:
            step, planned = self.progress["step"], self.progress["planned_steps"]
            minutes = self.arguments.get("max_minutes")
            parts.append(f"stopped after {step:,} of {planned:,} steps by max_minutes: {minutes:g}")
            if self.arguments.get("required_eval_loss") is None:
                converged = step >= ENOUGH_STEPS * planned
        if not converged:
            parts.append("not converged")
        if self.missed_loss:
            loss, required = self.evaluation.get("eval_loss", float("nan")), self.arguments["required_eval_loss"]
            parts[-1] += f": the evaluation loss is {loss:.3f}, required_eval_loss {required:g}"
        return "; ".join(parts)

    @property
    def procedural(self) -> bool:
        """Whether the project's own meshes are all that the model has learnt from."""
        return bool(self.arguments) and not (
            self.arguments.get("train_file") or self.arguments.get("model_name_or_path")
        )


def read_run(folder: Path) -> RunRecord:
    """
    The record of a run from its output folder, or from one of its checkpoints.

    Raises:
        ValueError: a file of the run cannot be read, naming it.
    """
    run = RunRecord()
    card, output_dir, step = folder / "README.md", folder, None
    if match := re.fullmatch(r"checkpoint-(\d+)", folder.name):
        output_dir, step = folder.parent, int(match[1])
    states = [path for path in output_dir.glob(f"checkpoint-*/{STATE}") if step is None or path.parent == folder]
    path = card
    try:
        if card.is_file():
            run.metadata = ModelCard.load(card, ignore_metadata_errors=True).data.to_dict()
        evaluated: dict[float, int] = {}  # the steps of checkpoints by their loss
        for path in states:
            progress = json.loads(path.read_text(encoding="utf-8"))
            if progress["step"] >= run.progress.get("step", 0):
                run.progress = progress
            if progress.get("eval_loss") is not None:
                evaluated[progress["eval_loss"]] = progress["step"]
        path = output_dir / LOG
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        evaluations = [line for line in map(json.loads, lines) if "eval_loss" in line]
        if step is None and evaluated and run.arguments.get("load_best_model_at_end"):
            step = evaluated[min(evaluated)]
        if step is not None:
            evaluations = [line for line in evaluations if line["step"] == step]
        run.evaluation = evaluations[-1] if evaluations else {}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path} cannot be read: {error or type(error).__name__}") from error
    return run


def model_card(
    model: PreTrainedModel,
    run: RunRecord,
    repo_id: str,
    revision: str | None = None,
    license: str | None = None,
    datasets: Sequence[str] = (),
    samples: Sequence[str] = (),
) -> ModelCard:
    """
    The README.md of an iFlame model.

    Args:
        repo_id: name on the Hub, as the snippet uses it; `revision` likewise, if it is not the main branch.
        license: identifier of the Hub's list; by default what the metadata of the run say, and mit for a model that
            has learnt from the project's own meshes alone.
        datasets: names on the Hub of what it was trained on; by default what the metadata of the run say.
        samples: generated files that lie beside the card: samples.png, samples/*.glb.
    """
    name = repo_id.split("/")[-1]
    datasets = list(datasets) or run.metadata.get("datasets") or []
    license = license or run.metadata.get("license") or ("mit" if run.procedural else None)
    judged_on = PROCEDURAL if run.procedural else ", ".join(datasets) or "meshes of the run"
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag=PIPELINE_TAG,
        tags=["iflame", "mesh-generation", "mesh", "3d"],
        base_model=_base_model(run),
        license=license,
        license_name=run.metadata.get("license_name"),
        license_link=run.metadata.get("license_link"),
        datasets=datasets or None,
    )
    figures = {metric: run.evaluation[f"eval_{metric}"] for metric in METRICS if f"eval_{metric}" in run.evaluation}
    if figures:
        data.model_name = name
        data.eval_results = [
            EvalResult(
                task_type=PIPELINE_TAG,
                task_name="Mesh generation",
                dataset_type=datasets[0] if datasets else "meshes",
                dataset_name=f"{judged_on}, held out",
                metric_type=metric,
                metric_name=METRICS[metric],
                metric_value=value,
            )
            for metric, value in figures.items()
        ]
    return ModelCard.from_template(
        data,
        template_str=CARD_TEMPLATE,
        name=name,
        config=model.config,
        parameters=model.num_parameters(),
        samples=samples,
        number_of_sample_meshes=sum(sample.endswith(".glb") for sample in samples),
        usage=usage_snippet(model, run, repo_id, revision),
        pipeline=pipeline_snippet(model, run, repo_id, revision),
        asking=_asking(model, run),
        metrics=METRICS,
        evaluation={"all": figures, **run.evaluation.get("eval_by_category", {})} if figures else {},
        judged_on=judged_on,
        training=_training(run, datasets),
        license=license,
        citation=CITATION,
    )


def usage_snippet(model: PreTrainedModel, run: RunRecord, repo_id: str, revision: str | None = None) -> str:
    """Python code that generates meshes with the published model, as the samples of the run were generated."""
    at = f'revision="{revision}", ' if revision else ""
    faces, sampling = _most_faces(model, run), {"do_sample": True, **_sampling(run)}
    asked = _in_python(**_example(model, run), num_return_sequences=4)
    return f"""\
from transformers import AutoModel, AutoTokenizer

name = "{repo_id}"
tokenizer = AutoTokenizer.from_pretrained(name, {at}trust_remote_code=True)
model = AutoModel.from_pretrained(name, {at}trust_remote_code=True)

sampling = {sampling}
# at most {faces} faces, and the end of the mesh
most = {known_format().tokens_per_face} * {faces + 1}
ids = model.generate({asked}, max_new_tokens=most, **sampling)
for number, mesh in enumerate(tokenizer.batch_decode_mesh(ids)):
    mesh.export(f"mesh_{{number}}.glb")"""


def pipeline_snippet(model: PreTrainedModel, run: RunRecord, repo_id: str, revision: str | None = None) -> str:
    """The same with `pipeline("mesh-generation")`."""
    at = f'revision="{revision}", ' if revision else ""
    options = {"num_meshes": 4, **_example(model, run), "max_faces": _most_faces(model, run), "seed": 0}
    given = _in_python(**options, **_sampling(run))
    return f"""\
from transformers import pipeline

generator = pipeline("mesh-generation", model="{repo_id}", {at}trust_remote_code=True)
for number, mesh in enumerate(generator({given})):
    if len(mesh.faces):
        generator.export(mesh, f"mesh_{{number}}.obj")  # or glb, ply, stl"""


def _in_python(**arguments: Any) -> str:
    """The arguments of a call."""
    return ", ".join(
        f"{name}={json.dumps(value) if isinstance(value, str) else value}" for name, value in arguments.items()
    )


def _example(model: PreTrainedModel, run: RunRecord, both: bool = False) -> dict[str, Any]:
    """Something that the model can be asked for: a category, or where it knows none a number of faces."""
    asked: dict[str, Any] = {}
    if model.config.categories:
        asked["category"] = model.config.categories[0]
    if model.config.num_faces_range is not None and (both or not asked):
        fewest, most = model.config.num_faces_range
        asked["num_faces"] = max(fewest, min(round((fewest * most) ** 0.5), _most_faces(model, run)))
    return asked


def _asking(model: PreTrainedModel, run: RunRecord) -> str:
    """The paragraph about what meshes can be asked to be; empty for a model that was trained without conditions."""
    knows, config = [], model.config
    if config.categories:
        knows.append(f"a category ({', '.join(config.categories)})")
    if config.num_faces_range is not None:
        knows.append("a number of faces from {:,} to {:,}, which meshes have about".format(*config.num_faces_range))
    if not knows:
        return ""
    given = _in_python(**_example(model, run, both=True))
    return (
        f"The model can be asked for {'; and for '.join(knows)}: `generator({given})`. Without, it makes any. "
        "`guidance_scale=2.0` gives what is asked for more weight, at twice the work."
    )


def _most_faces(model: PreTrainedModel, run: RunRecord) -> int:
    return run.arguments.get("sample_max_faces") or known_format().most_faces(model.generation_config.max_length)


def _sampling(run: RunRecord) -> dict[str, float]:
    return {name: run.arguments[name] for name in ("temperature", "top_k", "top_p") if name in run.arguments}


def _base_model(run: RunRecord) -> str | None:
    """The Hub name of the model that training began from; a path of this machine says nothing to others."""
    name = run.arguments.get("model_name_or_path") or ""
    return name if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name) and not os.path.exists(name) else None


def _training(run: RunRecord, datasets: Sequence[str]) -> list[str]:
    """The paragraphs about the data and the length of the run."""
    lines = []
    if run.procedural:
        lines.append(f"Trained on {PROCEDURAL}, which the project generates itself.")
    elif datasets:
        names = ", ".join(f"[{name}](https://huggingface.co/datasets/{name})" for name in datasets)
        lines.append(f"Trained on {names}.")
    if labels := run.progress.get("labels"):
        minutes = run.progress["seconds"] / 60
        lines.append(f"{run.progress['step']:,} steps, {labels:,} tokens learnt from, {minutes:,.1f} minutes.")
    if shortfall := run.shortfall():
        lines.append(f"{shortfall[0].upper()}{shortfall[1:]}.")
    return lines
