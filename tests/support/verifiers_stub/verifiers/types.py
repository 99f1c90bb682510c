"""Messages and responses; strict about their fields, as the package's are."""

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(kw_only=True)
class Message:
    role: str
    content: Any

    def model_dump(self) -> dict[str, Any]:
        return asdict(self)

    def __getitem__(self, name: str) -> Any:
        return getattr(self, name)


@dataclass(kw_only=True)
class ResponseMessage(Message):
    role: str = "assistant"
    finish_reason: str
    is_truncated: bool


@dataclass(kw_only=True)
class Response:
    id: str
    created: int
    model: str
    message: ResponseMessage
