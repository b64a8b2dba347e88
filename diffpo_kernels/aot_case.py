"""One kernel and one way of launching it, for ahead-of-time compilation: what tests/aot compiles, measures and puts into the table."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class AotCase:
    """name: a row of the table. signature: argument name -> triton type ("*bf16", "i32", "fp32", "constexpr"). constexprs: name -> value.

    elements: how many elements one program handles, to state instructions per element; 0 where that says nothing.
    tensor_cores: matrix instructions must be present (bf16 HMMA on sm_80, HGMMA on sm_90, tcgen05/UTCHMMA on sm_100).
    max_spills, max_shared: bytes. No architecture is allowed more shared memory than it has.
    divisible: pointer and integer arguments that are multiples of 16 at launch (allows vector loads).
    """

    name: str
    kernel: Any
    signature: dict[str, str]
    constexprs: dict[str, Any]
    num_warps: int = 4
    num_stages: int = 3
    elements: int = 0
    tensor_cores: bool = False
    max_registers: int = 128
    max_shared: int = 48 * 1024
    max_spills: int = 0
    divisible: tuple[str, ...] = field(default=())
