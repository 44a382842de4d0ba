"""Run notebooks and store their outputs in place: `python tools/run_notebooks.py notebooks/*.ipynb`.

What is stored is what a reader of the page can use: no widget (without its kernel it shows its repr), and no
stderr, which holds the progress bars of libraries.
"""

import os
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

WIDGET = "application/vnd.jupyter.widget-view+json"


def run(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(
        notebook, timeout=1800, store_widget_state=False, record_timing=False, resources={"metadata": {"path": str(path.parent)}}
    )
    client.execute()
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [o for o in cell.outputs if o.get("name") != "stderr" and WIDGET not in o.get("data", {})]
    notebook.metadata = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    nbformat.write(notebook, path)


if __name__ == "__main__":
    os.environ.pop("MPLBACKEND", None)  # another backend than the notebook's own would store no plot
    os.environ["HF_HUB_OFFLINE"] = "1"
    for name in sys.argv[1:]:
        print(name, flush=True)
        run(Path(name))
