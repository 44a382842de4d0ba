"""Run notebooks and store their outputs in place: `python tools/run_notebooks.py notebooks/*.ipynb`.

What is stored is what a reader of the page can use: no widget (without its kernel it shows its repr), and
no stderr, which holds the progress bars of libraries. Plots are stored with a palette, at about a quarter
of the size.
"""

import base64
import io
import os
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbconvert.preprocessors import CoalesceStreamsPreprocessor
from PIL import Image

WIDGET = "application/vnd.jupyter.widget-view+json"


def with_palette(png: str) -> str:
    buffer = io.BytesIO()
    with Image.open(io.BytesIO(base64.b64decode(png))) as image:
        image.convert("RGB").quantize(32, dither=Image.Dither.NONE).save(buffer, "png", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode()


def run(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    where = {"metadata": {"path": str(path.parent)}}
    client = NotebookClient(notebook, timeout=1800, record_timing=False, resources=where)
    client.execute()
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [
                o for o in cell.outputs if o.get("name") != "stderr" and WIDGET not in o.get("data", {})
            ]
            for data in (o.data for o in cell.outputs if "image/png" in o.get("data", {})):
                data["image/png"] = with_palette(data["image/png"])
    CoalesceStreamsPreprocessor().preprocess(notebook, {})  # pieces of one print would be shown apart
    # Without language_info, which changes with every Python, and without the state of widgets.
    notebook.metadata = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    nbformat.write(notebook, path)


if __name__ == "__main__":
    os.environ.pop("MPLBACKEND", None)  # another backend than the notebook's own would store no plot
    os.environ["HF_HUB_OFFLINE"] = "1"
    for name in sys.argv[1:]:
        start = time.monotonic()
        run(Path(name))
        print(f"{name}: {time.monotonic() - start:.0f} s", flush=True)
