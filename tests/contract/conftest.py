from tests.contract import cases


def pytest_configure(config):
    cases.WITH_SLOW = "not slow" not in config.option.markexpr
