"""How much faster than an SVD of the whole matrix are the library's spectra and factors, and are they as good?

Singular values serve the plan; factors are computed for the scheme that was chosen, here at a quarter of the full rank.
"""

from __future__ import annotations

import torch
from harness import median_seconds, parse_arguments, publish

from torchsmooth._decompose import singular_values
from torchsmooth._leading import truncated_factors

SHAPES = ((64, 576), (256, 2304), (512, 4608), (768, 768), (768, 3072), (1536, 1536))


def main() -> None:
    """Measure and print the table."""
    arguments = parse_arguments(__doc__ or "")
    generator = torch.Generator().manual_seed(0)
    rows = []
    for rows_count, columns in SHAPES:
        weight = torch.randn(rows_count, columns, generator=generator).to(arguments.device)
        matrices, rank = weight.unsqueeze(0), min(weight.shape) // 4

        def whole(weight: torch.Tensor = weight) -> object:
            return torch.linalg.svd(weight, full_matrices=False)

        def spectrum(matrices: torch.Tensor = matrices) -> object:
            return singular_values(matrices)

        def factors(matrices: torch.Tensor = matrices, rank: int = rank) -> object:
            return truncated_factors(matrices, rank)

        svd_time, spectrum_time, factor_time = median_seconds(
            (whole, spectrum, factors), arguments.device, arguments.runs
        )
        left, values, right = torch.linalg.svd(weight.double(), full_matrices=False)
        best = (left[:, :rank] * values[:rank]) @ right[:rank]
        up, down = truncated_factors(matrices, rank)
        difference = float((up[0] @ down[0] - best).norm() / weight.double().norm())
        rows.append(
            (
                f"{rows_count} × {columns}",
                f"{1e3 * svd_time:.1f} ms" if arguments.device.startswith("cuda") else "1",
                f"{svd_time / spectrum_time:.1f} ×",
                f"{svd_time / factor_time:.1f} ×",
                f"{difference:.1e}",
            )
        )
    header = (
        "float32 weight",
        "torch.linalg.svd",
        "singular values: faster by",
        "rank-r factors: faster by",
        "‖difference‖ / ‖W‖ to a float64 SVD",
    )
    publish("decompose", "Decomposing one layer", header, rows, arguments)


if __name__ == "__main__":
    main()
