"""The page of claims, carried out on a store without records."""

import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

from mmdd.claims import load_claims

ROOT = Path(__file__).parents[2]


@pytest.mark.notebook
def test_without_records_everything_is_not_yet_run(tmp_path: Path) -> None:
    output = tmp_path / "out.ipynb"
    command = [sys.executable, "-m", "papermill", "--no-progress-bar", "--log-level", "ERROR"]
    environment = {k: v for k, v in os.environ.items() if k != "MPLBACKEND"}
    done = subprocess.run(
        [*command, "claims.ipynb", str(output), "-p", "results_dir", str(tmp_path / "none")],
        capture_output=True,
        text=True,
        cwd=ROOT / "book",
        env=environment | {"OMP_NUM_THREADS": "1"},
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, done.stderr
    code = [c for c in nbformat.read(output, as_version=4).cells if c.cell_type == "code"]
    outputs = [o for cell in code for o in cell.outputs]
    assert not [o for o in outputs if o.output_type == "error" or o.get("name") == "stderr"]
    pages = [o["data"]["text/html"] for o in outputs if "claims-scroll" in str(o)]
    table, details = (page for page in pages if "verdict" in page)
    claims = load_claims()
    assert all(f'href="#claim-{claim.id}"' in table for claim in claims)
    assert all(f'id="claim-{claim.id}"' in details for claim in claims)
    shown = re.findall(r'<td class="verdict ([a-z-]+)">', table + details)
    assert len(shown) > 2 * len(claims)
    assert set(shown) == {"not-yet-run"}
    rule = next(o["data"]["text/markdown"] for o in outputs if "text/markdown" in str(o))
    assert rule.startswith("Every comparison is a difference")
