"""Keep the similarity matrix of a distilled set for the book, without its images.

python tools/keep_similarity.py results/<sweep>/sets/<set id>.safetensors results/shown/<name>
"""

import sys
from pathlib import Path

from mmdd.files import save_tensors
from mmdd.synthetic import SyntheticPairs


def main(source: str, target: str) -> None:
    """Write the matrix S̃ (N, N) and where it is from as one small .safetensors file."""
    pairs = SyntheticPairs.load(source)
    if pairs.similarity is None:
        raise SystemExit(f"{source} has no learned similarity.")
    about = {key: pairs.metadata[key] for key in ("method", "settings", "set_id", "source_hash")}
    matrix = pairs.similarity.matrix()
    save_tensors(Path(target), {"similarity": matrix}, {"format": "mmdd.similarity"} | about)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        raise SystemExit(__doc__)
    main(*sys.argv[1:])
