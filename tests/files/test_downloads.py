"""Whether what is to be downloaded can be."""

import pytest

from coin.files.downloads import is_found


def test_a_proxy_may_reach_a_host_without_an_address(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    assert not is_found("nowhere.invalid")
    monkeypatch.setenv("https_proxy", "http://proxy.example:3128")
    assert is_found("nowhere.invalid")
