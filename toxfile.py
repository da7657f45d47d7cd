"""Adds one setting to tox environments: `package_deps = false` installs the wheel without its dependencies.

tox itself always installs them, and the loader's tests must show that it needs no torch.
"""

from tox.config.sets import EnvConfigSet
from tox.plugin import impl
from tox.session.state import State
from tox.tox_env.api import ToxEnv
from tox.tox_env.python.package import WheelPackage


@impl
def tox_add_env_config(env_conf: EnvConfigSet, state: State) -> None:
    env_conf.add_config("package_deps", of_type=bool, default=True, desc="install the package's dependencies")


@impl
def tox_on_install(tox_env: ToxEnv, arguments: object, section: str, of_type: str) -> None:
    if of_type == "package" and isinstance(arguments, list) and not tox_env.conf["package_deps"]:
        arguments[:] = [WheelPackage(package.path, []) for package in arguments]
