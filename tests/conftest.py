"""The fixtures, in processes that run tests. xdist's own does not, and importing the hosts there takes it 8 s."""


def pytest_configure(config):
    if hasattr(config, "workerinput") or not config.getoption("numprocesses", None):
        config.pluginmanager.import_plugin("shared_fixtures")
