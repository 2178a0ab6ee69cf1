"""What the machine's matrix units can do: the best rate of large square products, and of an expert's own."""

from collections.abc import Iterator

import torch

from benchmarks.table import Row
from benchmarks.timing import DEVICE, Action, Ratio, interleaved
from stages.model.layers import has_bfloat16

FLOAT32, BF16 = {"float32": torch.float32}, {"bf16": torch.bfloat16} if has_bfloat16(DEVICE.type) else {}
DTYPES = BF16 if BF16 and DEVICE.type == "cuda" else FLOAT32 | BF16  # nobody trains in float32 on such a GPU
SQUARE = 2048 if DEVICE.type == "cpu" else 8192
DATA_SHEET_BF16_FLOPS = {"A100": 312e12, "H100": 989.4e12, "H200": 989.4e12}  # per second, dense, of the SXM boards


def data_sheet_flops() -> float | None:
    """What the maker promises of this GPU, where it is one of the list."""
    name = torch.cuda.get_device_name() if DEVICE.type == "cuda" else ""
    return next((flops for chip, flops in DATA_SHEET_BF16_FLOPS.items() if chip in name), None)


def product(rows: int, inner: int, columns: int, dtype: torch.dtype) -> tuple[Action, float]:
    """One matrix product into memory that is already there, and its floating-point operations."""
    a, b = (torch.randn(*size, device=DEVICE).to(dtype) for size in ((rows, inner), (inner, columns)))
    out = torch.empty(rows, columns, device=DEVICE, dtype=dtype)
    return (lambda: torch.mm(a, b, out=out)), 2.0 * rows * inner * columns


def ceiling(dtype: torch.dtype) -> Action:
    """The product that stands for the ceiling; measure it in the rounds of what is compared with it."""
    return product(SQUARE, SQUARE, SQUARE, dtype)[0]


def ceiling_flops() -> float:
    return 2.0 * SQUARE**3


def rows(square: int = SQUARE, seconds: float = 3.0) -> Iterator[Row | str]:
    shapes = {
        "square": (square, square, square),
        "half the square": (square // 2, square // 2, square // 2),
        "gate and up of an expert, 1024 tokens": (1024, 256, 1024),
    }
    actions, flops = {}, {}
    dtypes = FLOAT32 | DTYPES
    for dtype in dtypes:
        for shape, sizes in shapes.items():
            actions[f"{shape} {dtype}"], flops[f"{shape} {dtype}"] = product(*sizes, dtypes[dtype])
    times = interleaved(actions, seconds)

    def gflops(name):
        return flops[name] / times.median(name) / 1e9

    def rate_ratio(ours, theirs):
        scale, r = flops[ours] / flops[theirs], times.ratio(theirs, ours)
        return Ratio(r.ratio * scale, r.low * scale, r.high * scale)

    slow, fast = "square float32", "square bf16"
    if fast in actions:
        yield Row.of(
            "matmul ceiling",
            f"bf16, {square}³",
            gflops(fast),
            "float32",
            gflops(slow),
            "GFLOP/s",
            rate_ratio(fast, slow),
            times.rounds,
        )
    else:
        yield "bf16 left out: this machine's matrix units do not have it, and training takes float32 here"
    for shape in list(shapes)[1:]:
        for dtype in dtypes:
            ours, theirs = f"{shape} {dtype}", f"square {dtype}"
            yield Row.of(
                "matmul ceiling",
                f"{shape}, {dtype}",
                gflops(ours),
                f"{square}³ {dtype}",
                gflops(theirs),
                "GFLOP/s",
                rate_ratio(ours, theirs),
                times.rounds,
                of_ceiling=True,
            )
