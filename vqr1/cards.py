"""The model card of a trained policy: data, settings, results and limits."""

from dataclasses import asdict
from pathlib import Path

import pandas as pd
import yaml
from huggingface_hub import ModelCardData

from vqr1.config import Settings
from vqr1.data.public_sets import PUBLIC_SETS, public_name

LIMITS = """\
- It judges technical quality as the raters of its training sets did, asked one fixed English question about
  one picture; it is no judge of content or beauty.
- A score is comparable with scores of this policy alone. Its scale is the prompt's 1..5: reinforcement
  learning to rank teaches the order, not the scale.
- Its reasoning is a means to the score, and may name what is not there.
- The validation pictures are of the training sets. For other pictures, measure:
  `vqr1 evaluate --policy FOLDER --sets manifest.csv`.
"""
SIMULATED = """\
- Sets named `sim-…` are rated by simulated observers, a function of distortion and level, not by people.
"""


def model_card(settings: Settings, log: pd.DataFrame, machine: str) -> str:
    """Return the text of a policy's README.md, with the header that the Hugging Face hub reads.

    Args:
        settings: the run's.
        log: its log.csv.
        machine: the log's first line, from `machine_line`.
    """
    base = settings.model_name_or_path
    header = ModelCardData(
        library_name="peft" if settings.use_peft else "transformers",
        pipeline_tag="image-text-to-text",
        tags=["image-quality-assessment", "vqr1", "grpo", "trl"],
        base_model=base if base.count("/") == 1 and not Path(base).exists() else None,
    )
    sets = ", ".join(f"`{name}`" for name in settings.sets)
    prompt = "thinking" if settings.thinking else "non-thinking"
    compared = ", ".join(f"`{name}`" for name in settings.comparisons)
    learned = f" Of {compared} it learned from comparisons of pairs, not from MOS." if compared else ""
    simulated = SIMULATED if any(name.startswith("sim-") for name in settings.sets) else ""
    return f"""---
{header.to_yaml()}
---

# A policy for image quality assessment

`{base}`, trained by reinforcement learning to rank after VisualQuality-R1 (arXiv 2505.14460), with the
{prompt} prompt.
It scores a picture from 1 (very poor) to 5 (excellent).

```python
from vqr1.scoring import Scorer

print(Scorer("FOLDER", thinking={settings.thinking}).score(["picture.jpg"]))
```

## Data

Rows with split `train` of {sets}; pictures are compared with pictures of the same set alone.{learned}
{_sources(settings)}
## Results

{_results(settings, log)}

## Limits

{simulated}{LIMITS}
## Settings

{machine}

```yaml
{yaml.safe_dump(asdict(settings), sort_keys=False).strip()}
```
"""


def _sources(settings: Settings) -> str:
    """Return a line on each public set: where its pictures and ratings come from, and its terms."""
    public = [PUBLIC_SETS[name] for name in map(public_name, settings.sets) if name]
    return "".join(f"\n- {known.title}: {known.source}\n  Licence: {known.licence}.\n" for known in public)


def _results(settings: Settings, log: pd.DataFrame) -> str:
    seen = log.dropna(subset=["val_srcc"])
    if seen.empty:
        return "No validation gave an SRCC."
    first, last = seen.iloc[0], seen.iloc[-1]
    return f"""\
On {settings.validation["rows"]} rows or fewer with split `val`, a fixed sample that training was watched on,
so no test:

| step | SRCC | PLCC |
|---|---|---|
| {first["step"]:.0f} | {first["val_srcc"]:.3f} | {first["val_plcc"]:.3f} |
| {last["step"]:.0f} | {last["val_srcc"]:.3f} | {last["val_plcc"]:.3f} |"""
