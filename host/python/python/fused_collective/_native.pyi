from os import PathLike
from typing import Optional, Tuple

__version__: str

_Tensor = Tuple[int, int, int]

def workspace_bytes(cuda: bool, world_size: int, max_row_bytes: int, max_tokens: int) -> int: ...

class Capture: ...

class Operation:
    def __new__(
        cls,
        dtype: str,
        tokens: int,
        hidden: int,
        *,
        residual: str = ...,
        bias: bool = ...,
        norm: bool = ...,
        epsilon: float = ...,
        weight_bias: float = ...,
        gamma: Optional[str] = ...,
        post_norm: bool = ...,
        post_epsilon: float = ...,
        post_weight_bias: float = ...,
        post_gamma: Optional[str] = ...,
        top_k: int = ...,
        expert_scales: Optional[str] = ...,
        shared_expert: bool = ...,
        quantization: str = ...,
        layout: str = ...,
        group: int = ...,
        group_scale: str = ...,
        keep_norm: bool = ...,
        rounding: str = ...,
        mode: str = ...,
        wire: Optional[str] = ...,
        partial_sums: str = ...,
    ) -> Operation: ...
    @property
    def writes_norm(self) -> bool: ...
    @property
    def reads_scale(self) -> bool: ...
    @property
    def quant_row_bytes(self) -> int: ...
    @property
    def scale_bytes(self) -> int: ...

class Communicator:
    @staticmethod
    def join(
        membership: Optional[Tuple[int, int, str]],
        *,
        cuda: bool,
        device: Optional[int],
        max_row_bytes: int,
        max_tokens: int,
        deadline: float,
        oversubscribe: bool,
        check_scales: bool,
        kernels: Optional[PathLike[str] | str],
        address: Optional[str] = ...,
    ) -> Communicator: ...
    @property
    def rank(self) -> int: ...
    @property
    def world_size(self) -> int: ...
    @property
    def device(self) -> Optional[int]: ...
    def residual_rows(self, operation: Operation) -> int: ...
    def query(self, operation: Operation) -> Tuple[str, int]: ...
    def enqueue(
        self,
        operation: Operation,
        input: Optional[_Tensor],
        residual: Optional[_Tensor],
        bias: Optional[_Tensor],
        gamma: Optional[_Tensor],
        scale: Optional[_Tensor],
        residual_out: _Tensor,
        norm_out: Optional[_Tensor],
        quant_out: Optional[_Tensor],
        scale_out: Optional[_Tensor],
        stream: int,
        /,
        post_gamma: Optional[_Tensor] = ...,
        experts: Optional[Tuple[_Tensor, _Tensor, _Tensor]] = ...,
    ) -> None: ...
    def synchronize(self, stream: int) -> None: ...
    def check(self) -> None: ...
    def captured(self) -> Capture: ...
    def replay(self, capture: Capture) -> None: ...
    def abort(self) -> None: ...
    def leave(self) -> None: ...
