"""The model card of a trained policy: on what, how and how well it was trained, and what it is not good for."""

from pathlib import Path

import pandas as pd
import yaml

LIMITS = """\
- It judges technical quality as the raters of its training sets did, asked one fixed English question about one picture; it is no judge of content or beauty.
- A score is comparable with scores of this policy alone. Its scale is the prompt's 1..5: reinforcement learning to rank teaches the order, not the scale.
- Its reasoning is a means to the score, and may name what is not there.
- The validation pictures are of the training sets. For other pictures, measure: `vqr1 evaluate --policy FOLDER --sets manifest.csv`.
"""
SIMULATED = "- Sets named `sim-…` are rated by simulated observers, a function of distortion and level, not by people.\n"


def model_card(config: dict, log: pd.DataFrame, machine: str) -> str:
    """Return the text of a policy's README.md, with the header that the Hugging Face hub reads.

    config: the run's; log: its log.csv; machine: `records.machine_line`.
    """
    base = str(config["policy"])
    hub = base.count("/") == 1 and not Path(base).exists()
    header = {
        "library_name": "peft" if config["lora"] else "transformers",
        "pipeline_tag": "image-text-to-text",
        "tags": ["image-quality-assessment", "vqr1", "grpo", "trl"],
    } | ({"base_model": base} if hub else {})
    prompt = "thinking" if config["thinking"] else "non-thinking"
    simulated = SIMULATED if any(str(name).startswith("sim-") for name in config["sets"]) else ""
    return f"""---
{yaml.safe_dump(header, sort_keys=False)}---

# A policy for image quality assessment

`{base}`, trained by reinforcement learning to rank after VisualQuality-R1 (arXiv 2505.14460), with the {prompt} prompt.
It scores a picture from 1 (very poor) to 5 (excellent).

```python
from vqr1.scoring import Scorer

print(Scorer("FOLDER", thinking={config["thinking"]}).score(["picture.jpg"]))
```

## Data

Rows with split `train` of {", ".join(f"`{name}`" for name in config["sets"])}; pictures are compared with pictures of the same set alone.

## Results

{_results(config, log)}

## Limits

{simulated}{LIMITS}
## Settings

{machine}

```yaml
{yaml.safe_dump(config, sort_keys=False).strip()}
```
"""


def _results(config: dict, log: pd.DataFrame) -> str:
    seen = log.dropna(subset=["val_srcc"])
    if seen.empty:
        return "No validation gave an SRCC."
    first, last = seen.iloc[0], seen.iloc[-1]
    return f"""On {config["validation"]["rows"]} rows or fewer with split `val`, a fixed sample that training was watched on, so no test:

| step | SRCC | PLCC |
|---|---|---|
| {first["step"]:.0f} | {first["val_srcc"]:.3f} | {first["val_plcc"]:.3f} |
| {last["step"]:.0f} | {last["val_srcc"]:.3f} | {last["val_plcc"]:.3f} |"""
