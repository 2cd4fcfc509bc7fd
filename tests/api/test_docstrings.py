"""Runs the example in the docstring of every function and method of the Python API."""

import doctest
import inspect

import pytest

import ftjax

PLAIN = {"Interrupted", "UserError", "__version__"}


def examples() -> dict[str, doctest.DocTest]:
    """Return what is public, with the example in its docstring."""
    found = {}
    for name in sorted({*ftjax.__all__} - PLAIN):
        one = ftjax._function(name)
        parts = {name: one}
        if inspect.isclass(one):
            own = {key: value for key, value in vars(one).items() if not key.startswith("_") and inspect.isfunction(value)}
            parts |= {f"{name}.{key}": value for key, value in own.items()}
        for dotted, part in parts.items():
            found[dotted] = doctest.DocTestParser().get_doctest(part.__doc__ or "", {"ftjax": ftjax}, dotted, None, None)
    return found


EXAMPLES = examples()
WITHOUT = {"Chat", "Model"}  # classes whose methods have them


@pytest.mark.parametrize("name", sorted(EXAMPLES))
def test_the_example_runs(home, name):
    test = EXAMPLES[name]
    assert bool(test.examples) == (name not in WITHOUT)
    said: list[str] = []
    doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(test, out=said.append)
    assert not said, "".join(said)
