"""Text that `vqr1 data` prints: which sets there are, what one holds, BIQ2021's near twins."""

from pathlib import Path

from vqr1.data.comparisons import PairTable
from vqr1.data.manifests import has_comparisons, load_comparisons, load_ratings
from vqr1.data.people_sets import TWIN_BITS, TWIN_CORRELATION, near_twins
from vqr1.data.public_sets import PUBLIC_SETS, public_name, read_public
from vqr1.places import data_root


def list_sets() -> str:
    """Return each public set's source, size and licence, and what its folder should hold."""
    lines = []
    for name, entry in PUBLIC_SETS.items():
        lines += [
            f"{name}: {entry.title}; {entry.rows} pictures",
            f"    where: {entry.source}",
            f"    size: {entry.size}; licence: {entry.licence}",
            f"    expected: {entry.layout}",
            f"    {entry.note}",
        ]
    return "\n".join(lines)


def describe_rows(name: str, root: str | Path | None = None) -> tuple[str, str]:
    """Return a set's rows, ranges, splits and missing pictures as text, and the layout it lacks ("": none).

    name: of a public or an embedded set, or the path of a manifest.
    root: as for `load_ratings`, whose errors it raises, save for missing pictures.
    """
    known = public_name(name)
    public = PUBLIC_SETS.get(known)
    frame = read_public(known, root or data_root(), strict=False) if public else load_ratings(name, root)
    missing = frame.attrs.get("missing", [])
    absent = f", {len(missing)} missing" if missing else ""
    published = f"; published: {public.rows}" if public else ""
    mos = _span(frame["mos"])
    lines = [
        f"{known or name}, in {frame.attrs['root']}",
        f"pictures    {len(frame) - len(missing)}{absent}{published}",
        f"mos         {mos}, higher is better" if mos != "none" else "mos         none",
        f"std         {_span(frame['std'])}",
        f"references  {frame['reference'].nunique()}",
        f"splits      {_counts(frame['split'].replace('', 'none').value_counts())}",
    ]
    if "subset" in frame:
        lines.append(f"subsets     {_counts(frame['subset'].value_counts().sort_index())}")
    if has_comparisons(name):
        lines.append(f"compared    {_compared(load_comparisons(name, root, strict=False), len(frame))}")
    if public:
        lines.append(f"note        {public.note}")
    lines += [f"missing: {picture}" for picture in missing[:10]]
    return "\n".join(lines), public.layout if missing else ""


def _span(values) -> str:
    return f"{values.min():.4g} to {values.max():.4g}" if values.notna().any() else "none"


def _compared(pairs, pictures: int) -> str:
    """Describe comparisons: how many pairs, their share of all pairs of the pictures, and the ties."""
    shares = PairTable(pairs, pairs.attrs["dataset"]).shares  # both directions
    count, of = len(shares) // 2, pictures * (pictures - 1) // 2
    ties = (shares == 0.5).sum() // 2
    return f"{count} of {of} pairs ({count / of:.0%}), {ties} of them ties ({ties / count:.0%})"


def _counts(counts) -> str:
    return ", ".join(f"{value} {count}" for value, count in counts.items())


def twins_table(name: str, root: str | Path | None = None) -> str:
    """Return data/biq2021_twins.csv as text, found anew in the set's pictures.

    name: "biq2021", in any spelling; ValueError for another.
    root: as for `load_ratings`.
    """
    if public_name(name) != "biq2021":
        raise ValueError("--twins is for biq2021 alone: its official split is known to have them")
    frame = read_public("biq2021", root or data_root(), strict=True)
    paths = [Path(frame.attrs["root"], image) for image in frame["image"]]
    twins = near_twins(paths, frame["name"], frame["part"] == "train")
    rule = f"dHash <= {TWIN_BITS} of 256 bits, thumbnails' correlation > {TWIN_CORRELATION}"
    head = f"# near twins of BIQ2021: {rule}; nearest: training picture; made by vqr1 data biq2021 --twins\n"
    return head + twins.to_csv(index=False, lineterminator="\n")
