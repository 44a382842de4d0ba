"""Share what several test files use, except fixtures.

It is not in conftest.py: the notebooks have a file of that name too, and only one can be imported by it.
"""

from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def of_each(paths: list[Path]) -> Callable:
    """Turn a check of one file into one test of all files, which lists every failure."""

    def test_of_all(check: Callable[[Path], None]) -> Callable[[], None]:
        def test() -> None:
            failures = []
            for path in paths:
                try:
                    check(path)
                except AssertionError as error:
                    failures.append(f"{path.relative_to(ROOT)}: {error}")
            assert not failures, "\n\n".join(failures)

        test.__name__, test.__doc__ = check.__name__, check.__doc__
        return test

    return test_of_all


def pushed(model, processor) -> set[int]:
    """Make a model write only a picture's placeholder and its kin; return their ids."""
    import torch

    from vqr1.policy import VISION

    ids = processor.tokenizer.convert_tokens_to_ids(list(VISION))
    head = model.lm_head
    head.weight = torch.nn.Parameter(head.weight.detach().clone())  # no longer the embeddings'
    nothing = torch.zeros(len(head.weight), dtype=head.weight.dtype)
    head.bias = torch.nn.Parameter(nothing, requires_grad=False)
    head.bias.data[ids] = 100.0
    return set(ids)
