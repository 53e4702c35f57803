"""How deep JSON is nested, told while its bytes come by: a streaming parser spends time on depth that grows squared."""

MAX_DEPTH = 100  # LaMP's files have 4
OTHERS = bytes(set(range(256)) - set(b"[]{}"))


class Depth:
    """Follows the depth from one piece of a file to the next."""

    def __init__(self) -> None:
        self.depth = 0
        self._open = b""  # a quote where the last piece ended inside a string; then perhaps an escape without its sign

    def feed(self, piece: bytes) -> None:
        """Take the next bytes of the file; ValueError where they are nested deeper than `MAX_DEPTH`."""
        parts = (self._open + piece).replace(b"\\\\", b"").replace(b'\\"', b"").split(b'"')
        self._open = b'"' * (len(parts) % 2 == 0) + b"\\" * parts[-1].endswith(b"\\")
        for bracket in b"".join(parts[::2]).translate(None, OTHERS):
            self.depth += 1 if bracket in b"[{" else -1
            if self.depth > MAX_DEPTH:
                raise ValueError(f"nested deeper than {MAX_DEPTH} levels")
