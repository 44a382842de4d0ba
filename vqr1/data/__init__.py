"""Rated pictures: sets, their rows, and batches of them for TRL; names are imported at first use."""

from vqr1 import lazy

__getattr__, __dir__, __all__ = lazy(
    __name__,
    {
        "manifests": "load_ratings load_comparisons read_manifest render render_rows pictures_of folder_rows "
        "EMBEDDED HELD_OUT TRAINED UNRATED",
        "batches": "prompt_rows one_set_batches realigned",
        "images": "open_picture",
        "folders": "find_pictures",
        "observers": "human_cells pairwise_votes",
    },
)
