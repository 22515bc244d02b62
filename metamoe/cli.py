"""The flags that several stages have, each defined once."""


def add_machine_flags(parser):
    """Where and how a stage computes: --workers, --device, --dtype."""
    parser.add_argument(
        "--workers", type=int, help="processes that decode images (default: one a core with CUDA, else none)"
    )
    parser.add_argument("--device", default="auto", help="auto (CUDA if there is one), cpu or cuda")
    parser.add_argument(
        "--dtype",
        default="auto",
        choices=["auto", "float32", "bfloat16"],
        help="auto: bfloat16 where the hardware computes in it",
    )
