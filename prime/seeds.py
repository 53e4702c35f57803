"""Seeds derived from names: a result is a function of settings, seed and user, and of no order."""
import hashlib


def derive_seed(*parts: object) -> int:
    """A 63-bit seed that is a function of its parts alone (run seed, user id, ...)."""
    text = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:8], "big") >> 1
