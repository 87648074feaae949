"""Certificates that go wrong, made by the command openssl."""

from __future__ import annotations

import ssl
import subprocess
from dataclasses import dataclass
from pathlib import Path

_CONFIG = """
[ca]
default_ca = own
[own]
database = index
serial = serial
new_certs_dir = .
default_md = sha256
policy = policy
copy_extensions = copy
[policy]
commonName = supplied
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Authority:
    """A certificate authority in a folder; `file` is what a client has to trust."""

    folder: Path

    @property
    def file(self) -> Path:
        return self.folder / "ca.pem"

    def context(self, name: str, alternative: str, start: str, end: str) -> ssl.SSLContext:
        """Return a server's side of TLS with a certificate for a name (`IP:…`, `DNS:…`) and a time (YYYYMMDD)."""
        self._request(name, alternative)
        dates = ["-startdate", f"{start}000000Z", "-enddate", f"{end}000000Z"]
        keys = ["-cert", "ca.pem", "-keyfile", "ca.key"]
        _openssl(self.folder, "ca", "-batch", "-config", "ca.cnf", *keys, *dates, "-in", f"{name}.csr", "-out", name)
        return _context(self.folder / name, self.folder / f"{name}.key")

    def self_signed(self, name: str, alternative: str) -> ssl.SSLContext:
        """Return a server's side of TLS with a certificate that nobody vouches for."""
        _certificate(self.folder, name, f"{name}.pem", "-addext", f"subjectAltName={alternative}")
        return _context(self.folder / f"{name}.pem", self.folder / f"{name}.key")

    def _request(self, name: str, alternative: str) -> None:
        _openssl(
            self.folder,
            *("req", "-newkey", "rsa:2048", "-nodes", "-subj", f"/CN={name}"),
            *("-addext", f"subjectAltName={alternative}", "-keyout", f"{name}.key", "-out", f"{name}.csr"),
        )


def authority(folder: Path) -> Authority:
    """Found a certificate authority."""
    (folder / "ca.cnf").write_text(_CONFIG)
    (folder / "index").touch()
    (folder / "index.attr").write_text("unique_subject = no\n")
    (folder / "serial").write_text("01\n")
    _certificate(folder, "ca", "ca.pem")
    return Authority(folder=folder)


def _certificate(folder: Path, name: str, output: str, *more: str) -> None:
    key = ("-newkey", "rsa:2048", "-nodes", "-keyout", f"{name}.key")
    _openssl(folder, "req", "-x509", *key, "-days", "2", "-subj", f"/CN={name}", *more, "-out", output)


def _openssl(folder: Path, *words: str) -> None:
    subprocess.run(["openssl", *words], cwd=folder, check=True, capture_output=True, timeout=30)


def _context(certificate: Path, key: Path) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    return context
