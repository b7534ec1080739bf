"""Ed25519 signatures of packs; needs the package cryptography, the extra ``packs``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from chunkllama.errors import ConfigError


def load_public_key(path: Path, key: str) -> bytes:
    """Read a PEM file with an Ed25519 public key; returns its 32 bytes.

    Args:
        key: the setting that names the file.

    Raises:
        ConfigError: cryptography is not installed, or the file holds no such key.
    """
    _check_installed(key)
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    try:
        loaded = load_pem_public_key(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"{key}: {path} cannot be read: {error.strerror}") from None
    except ValueError:  # with a long text and an address
        raise ConfigError(f"{key}: {path} is no PEM file of a public key") from None
    if not isinstance(loaded, Ed25519PublicKey):
        raise ConfigError(f"{key}: {path} holds no Ed25519 public key")
    return loaded.public_bytes_raw()


def load_signer(path: Path, key: str) -> Callable[[bytes], str]:
    """Read a PEM file with an Ed25519 private key; returns what signs with it, in hexadecimal.

    Raises:
        ConfigError: as ``load_public_key``.
    """
    _check_installed(key)
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    try:
        loaded = load_pem_private_key(path.read_bytes(), password=None)
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"{key}: {path} cannot be read as a PEM private key: {error}") from None
    if not isinstance(loaded, Ed25519PrivateKey):
        raise ConfigError(f"{key}: {path} holds no Ed25519 private key")
    return lambda text: loaded.sign(text).hex()


def is_signed(text: bytes, signature: str, public_key: bytes) -> bool:
    """Tell whether ``signature``, in hexadecimal, is that of ``text`` by the owner of the key."""
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    try:
        Ed25519PublicKey.from_public_bytes(public_key).verify(bytes.fromhex(signature), text)
    except (InvalidSignature, ValueError):
        return False
    return True


def _check_installed(key: str) -> None:
    try:
        import cryptography  # noqa: F401
    except ImportError:
        raise ConfigError(
            f"{key}: signatures need cryptography; pip install chunkllama[packs]"
        ) from None
