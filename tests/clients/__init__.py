"""Every client against a real server: `make clients`."""

import pytest

pytest.register_assert_rewrite("tests.clients.suite", "tests.clients.languages")
