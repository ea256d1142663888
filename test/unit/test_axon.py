"""Which address a neuron publishes."""

from __future__ import annotations

import pytest

from mapreduce.config import AxonConfig
from mapreduce.errors import ConfigError
from mapreduce.services.axon import choose_address

EVERYTHING = {"looked_up": "2.2.2.2", "shown": "4.4.4.4", "one_machine": False}
NOTHING = {"looked_up": None, "shown": None, "one_machine": False}


@pytest.mark.parametrize(
    ("config", "known", "expected"),
    [
        ({"external_ip": "1.1.1.1", "ip": "3.3.3.3"}, EVERYTHING, ("1.1.1.1", "axon.external_ip")),
        ({"ip": "3.3.3.3"}, EVERYTHING, ("2.2.2.2", "axon.lookup_url")),
        ({"ip": "3.3.3.3"}, EVERYTHING | {"looked_up": None}, ("3.3.3.3", "axon.ip")),
        ({"ip": "::1"}, NOTHING, ("::1", "axon.ip")),
        ({}, EVERYTHING | {"looked_up": None}, ("4.4.4.4", "the chain shows it")),
        ({"ip": "::"}, NOTHING | {"shown": "2001:db8::1"}, ("2001:db8::1", "the chain shows it")),
        (
            {},
            EVERYTHING | {"looked_up": None, "one_machine": True},
            ("127.0.0.1", "the chain is one of this machine"),
        ),
    ],
)
def test_the_strongest_source_wins_and_is_named(config, known, expected):
    address = choose_address(AxonConfig(**config), 8091, **known)
    assert (address.ip, address.source) == expected
    assert address.port == 8091


def test_nothing_is_guessed():
    with pytest.raises(ConfigError, match=r"--axon\.external_ip, or .* --axon\.lookup_url"):
        choose_address(AxonConfig(external_port=9000), 8091, **NOTHING)


def test_the_port_is_the_external_one_where_there_is_one():
    address = choose_address(AxonConfig(ip="::1", external_port=9000), 8091, **NOTHING)
    assert str(address) == "[::1]:9000"
