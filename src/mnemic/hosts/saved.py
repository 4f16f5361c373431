"""What every host with memory has, whatever its kind."""

from typing import Any


class SavedWithMemory:
    """Saves the memory with the host. In front of the host's own class."""

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """As the host's, with the memory's weights under `memory.` and `mnemic.json` beside them."""
        from .saving import write_header

        super().save_pretrained(save_directory, *args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]
        if kwargs.get("is_main_process", True):
            write_header(self, save_directory, kwargs.get("state_dict"))
