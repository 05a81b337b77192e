"""The page of a model on the Hugging Face Hub: README.md with metadata, from what a run left in its folder."""

import json
import os
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers import PreTrainedModel

from iflame_hf.format_iflame import known_format
from training.run.record import RunRecord

# The nearest of the Hub's tasks: none is for 3D from nothing, and a model without a task passes for a text generator.
PIPELINE_TAG = "text-to-3d"
METRICS = {
    "loss": "loss, nats a token",
    "perplexity": "perplexity",
    "token_accuracy": "coordinates right",
    "vertex_accuracy": "vertices right",
    "face_accuracy": "faces right",
}
USE = "Use"  # title of the section in the template
_KNOWN_METADATA = ("license", "datasets", "model-index")
# Options of train.py that a card tells where they are set.
_TOLD_SETTINGS = (
    *("weight_decay", "ema_decay", "scale_augmentation", "shift_augmentation", "turn_augmentation"),
    *("mirror_augmentation", "vertex_noise", "balance", "balance_power", "condition_on", "condition_dropout", "seed"),
)
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
{% if sampling -%}
## Sampling

{{ sampling }}

{% endif -%}
{% for title, text in sections.items() -%}
## {{ title }}

{{ text }}

{% endfor -%}
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


def model_card(
    model: PreTrainedModel,
    run: RunRecord,
    repo_id: str,
    revision: str | None = None,
    license: str | None = None,
    datasets: Sequence[str] = (),
    samples: Sequence[str] = (),
    sections: Mapping[str, str] | None = None,
    name: str | None = None,
) -> ModelCard:
    """
    The README.md of an iFlame model.

    Args:
        repo_id: name on the Hub, as the snippet uses it; `revision` likewise, if it is not the main branch.
        license: identifier of the Hub's list; by default what the metadata of the run say, and mit for a model that
            has learnt from the project's own meshes alone.
        datasets: names on the Hub of what it was trained on; by default what the metadata of the run say.
        samples: generated files that lie beside the card: samples.png, samples/*.glb.
        sections: markdown by title, for what the run has no record of; one on the evaluation replaces the run's.
        name: title of the card; by default the last part of `repo_id`.
    """
    name, sections = name or repo_id.split("/")[-1], dict(sections or {})
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
        sampling=_how_sampled(model),
        sections=sections,
        metrics=METRICS,
        evaluation=_by_category(run, figures) if "Evaluation" not in sections else {},
        judged_on=judged_on,
        training=_training(run, datasets),
        license=license,
        citation=CITATION,
    )


def keep_sections(
    new: ModelCard, kept: ModelCard, anew: Collection[str], repo_id: str, revision: str | None = None
) -> ModelCard:
    """
    The card of a model of which no run tells any more: all that its card said, but for what is known better now.

    Args:
        new: a card of the same model, whose licence, data sets and results hold where it has any.
        kept: the card that lies beside the weights.
        anew: titles of sections that are to be as in `new`, if they are in it.
        repo_id: name of the model in the code that the card shows; `revision` likewise.
    """
    sections, replacements = sections_of(kept.text), sections_of(new.text)
    sections |= {title: replacements[title] for title in anew if title in replacements}
    if USE in sections:
        sections[USE] = _renamed(sections[USE], repo_id, revision)
    text = "".join(f"## {title}\n{body}" if title else body for title, body in sections.items())
    known = new.data.to_dict()
    metadata = kept.data.to_dict() | {name: known[name] for name in _KNOWN_METADATA if name in known}
    return ModelCard(f"---\n{ModelCardData(**metadata, ignore_metadata_errors=True)}\n---\n{text}")


def _renamed(snippets: str, repo_id: str, revision: str | None) -> str:
    """The code of the two snippets below for another place of the model."""
    if not (named := re.search(r'^name = ("[^"\n]*")$', snippets, re.MULTILINE)):
        return snippets
    loading = _at(revision) + "trust_remote_code=True"
    return re.sub(
        r'(revision="[^"\n]*", )?trust_remote_code=True', loading, snippets.replace(named[1], f'"{repo_id}"')
    )


def _at(revision: str | None) -> str:
    return f'revision="{revision}", ' if revision else ""


def sections_of(text: str) -> dict[str, str]:
    """Markdown taken apart at its headings of the second level: what follows each, up to the next; "" is the head."""
    parts, title, in_code = {"": ""}, "", False
    for line in text.splitlines(keepends=True):
        in_code ^= line.startswith("```")
        if line.startswith("## ") and not in_code:
            title = line[3:].strip()
            parts[title] = ""
        else:
            parts[title] += line
    return parts


def usage_snippet(model: PreTrainedModel, run: RunRecord, repo_id: str, revision: str | None = None) -> str:
    """Python code that generates meshes with the published model, sampled as its folder says, else as in the run."""
    at, faces = _at(revision), _most_faces(model, run)
    asked = _in_python(**_example(model, run), num_return_sequences=4)
    sampling = {} if model.generation_config.do_sample else {"do_sample": True, **_sampling(model, run)}
    given = _in_python(**sampling)
    return f"""\
from transformers import AutoModel, AutoTokenizer

name = "{repo_id}"
tokenizer = AutoTokenizer.from_pretrained(name, {at}trust_remote_code=True)
model = AutoModel.from_pretrained(name, {at}trust_remote_code=True)

# at most {faces} faces, and the end of the mesh
most = {known_format().tokens_per_face} * {faces + 1}
ids = model.generate({asked}, max_new_tokens=most{given and f", {given}"})
for number, mesh in enumerate(tokenizer.batch_decode_mesh(ids)):
    mesh.export(f"mesh_{{number}}.glb")"""


def pipeline_snippet(model: PreTrainedModel, run: RunRecord, repo_id: str, revision: str | None = None) -> str:
    """The same with `pipeline("mesh-generation")`."""
    at = _at(revision)
    options = {"num_meshes": 4, **_example(model, run), "max_faces": _most_faces(model, run), "seed": 0}
    given = _in_python(**options, **_sampling(model, run))
    return f"""\
from transformers import pipeline

generator = pipeline("mesh-generation", model="{repo_id}", {at}trust_remote_code=True)
for number, mesh in enumerate(generator({given})):
    if len(mesh.faces):
        generator.export(mesh, f"mesh_{{number}}.obj")  # or glb, ply, stl"""


def _by_category(run: RunRecord, figures: dict[str, float]) -> dict[str, dict[str, float]]:
    return {"all": figures, **run.evaluation.get("eval_by_category", {})} if figures else {}


def _in_python(**arguments: Any) -> str:
    """The arguments of a call."""
    return ", ".join(
        f"{name}={json.dumps(value) if isinstance(value, str) else value}" for name, value in arguments.items()
    )


def _example(model: PreTrainedModel, run: RunRecord) -> dict[str, Any]:
    """What the model can be asked for, each with a value that it takes."""
    asked: dict[str, Any] = {}
    if model.config.categories:
        asked["category"] = model.config.categories[0]
    if model.config.num_faces_range is not None:
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
    given = _in_python(**_example(model, run))
    own = model.generation_config.guidance_scale
    guidance = "`guidance_scale=2.0` gives what is asked for more weight, at twice the work."
    if own not in (None, 1):
        guidance = (
            f"What is asked for has more weight by `guidance_scale={own:g}`, at twice the work of `guidance_scale=1`, "
            "which is without."
        )
    what = "; and for ".join(knows)
    return f"The model can be asked for {what}: `generator({given})`. Without, it makes any. {guidance}"


def _most_faces(model: PreTrainedModel, run: RunRecord) -> int:
    return run.arguments.get("sample_max_faces") or known_format().most_faces(model.generation_config.max_length)


def _how_sampled(model: PreTrainedModel) -> str:
    """The paragraph about the settings that the folder's generation_config.json gives generate() and the pipeline."""
    config = model.generation_config
    if not config.do_sample:
        return ""
    set_to = {
        name: getattr(config, name, None) for name in ("temperature", "top_p", "top_k", "min_p", "closing_strength")
    }
    given = ", ".join(f"`{name}={value:g}`" for name, value in set_to.items() if value)
    grammar = ", only tokens that can follow in a mesh (`mesh_grammar=True`)" if config.mesh_grammar else ""
    if config.mesh_grammar and not getattr(config, "keep_order", True):
        grammar += ", whose faces may leave their canonical order (`keep_order=False`)"
    return (
        f"Unless told otherwise, `generate()` and the pipeline sample with {given or 'all tokens'}{grammar}, and "
        f"make at most {_most_faces(model, RunRecord()):,} faces: `generation_config.json`. A smaller `top_p` and "
        "fewer faces give more meshes that are whole."
    )


def _sampling(model: PreTrainedModel, run: RunRecord) -> dict[str, float]:
    """How the run sampled, where the folder's generation_config.json does not say how to."""
    if model.generation_config.do_sample:
        return {}
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
    if settings := _settings(run):
        lines.append(settings)
    if labels := run.progress.get("labels"):
        minutes = run.progress["seconds"] / 60
        lines.append(f"{run.progress['step']:,} steps, {labels:,} tokens learnt from, {minutes:,.1f} minutes.")
    if shortfall := run.shortfall():
        lines.append(f"{shortfall[0].upper()}{shortfall[1:]}.")
    return lines


def _settings(run: RunRecord) -> str:
    """The settings of a run on meshes that were given to it, in a sentence; empty where they are not known."""
    given = run.arguments
    if "optim" not in given or run.procedural:
        return ""
    parts = [f"{given['optim']}, learning rate {given['learning_rate']:g} ({given['lr_scheduler_type']})"]
    if rows := given.get("per_device_train_batch_size"):
        rows *= given.get("gradient_accumulation_steps") or 1
        parts.append(f"{rows:,} rows of {given['row_length']:,} tokens a step and device")
    parts += [name for name in ("bf16", "fp16") if given.get(name)]
    for name in _TOLD_SETTINGS:
        if value := given.get(name):
            shown = " ".join(value) if isinstance(value, list) else value
            parts.append(name.replace("_", " ") + ("" if value is True else f" {shown}"))
    return f"Settings: {'; '.join(parts)}."
