# SPDX-License-Identifier: Apache-2.0
"""How certain a difference of two FIDs is: sets of pictures of examples/tables.py, drawn again with replacement.

    python examples/results/fid_bootstrap.py tables --reference test.features.npz --steps 50 --output fid.json

The same draw of picture numbers serves all sets, as the same seeds made them: a difference is one of pairs. The
reference is not drawn again.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch

from diffusers_dq.evaluation.provenance import provenance
from diffusers_dq.files import write_json
from diffusers_dq.frechet import frechet_distance

WHOLE = "full-precision"


def features(file: Path) -> torch.Tensor:
    """[n, D] fp64, as `diffusers-dq evaluate` keeps them beside a set."""
    with np.load(file) as content:
        return torch.from_numpy(content["pooled"]).double()


def bootstrap(sets: dict[str, torch.Tensor], reference: torch.Tensor, draws: int, seed: int) -> dict[str, Any]:
    """Set -> its FID, and of FID less full precision's over the draws: mean, standard deviation, share above 0.

    sets: name -> [n, D], of one n, "full-precision" among them.   reference: [m, D].
    """
    generator = torch.Generator().manual_seed(seed)
    n = len(sets[WHOLE])
    over: dict[str, list[float]] = {name: [] for name in sets if name != WHOLE}
    for _ in range(draws):
        drawn = torch.randint(n, (n,), generator=generator)
        whole = frechet_distance(sets[WHOLE][drawn], reference)
        for name in over:
            over[name].append(frechet_distance(sets[name][drawn], reference) - whole)
    found: dict[str, Any] = {name: {"FID": frechet_distance(rows, reference)} for name, rows in sets.items()}
    for name, differences in over.items():
        values = np.array(differences)
        found[name] |= {"mean": values.mean(), "sd": values.std(ddof=1), "share_above_0": (values > 0).mean()}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tables", type=Path, help="the output folder of examples/tables.py")
    parser.add_argument("--reference", type=Path, nargs="+", required=True, help="features of real pictures, .npz")
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--draws", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    files = sorted(options.tables.glob(f"{options.steps}-*/set/features-*.npz"))
    sets = {file.parents[1].name.removeprefix(f"{options.steps}-"): features(file) for file in files}
    named = {name if name.startswith("w") else WHOLE: rows for name, rows in sets.items()}
    if WHOLE not in named or len(named) != len(files):
        raise SystemExit(f"{options.tables} has no set of full precision at {options.steps} steps, or several")
    content = {
        "about": f"python examples/results/fid_bootstrap.py --steps {options.steps} --draws {options.draws}"
        f" --seed {options.seed}; FID, and FID less full precision's over the draws, by reference",
        **provenance("cpu"),
        "images": len(named[WHOLE]),
        "steps": options.steps,
        "draws": options.draws,
        "references": {
            file.name.split(".")[0]: bootstrap(named, features(file), options.draws, options.seed)
            for file in options.reference
        },
    }
    write_json(options.output, content)


if __name__ == "__main__":
    main()
