"""Runs the example in the docstring of every function and method of the Python API."""

import doctest
import inspect

import pytest

import ftjax

PLAIN = {"Interrupted", "OutOfMemory", "UserError", "__version__"}


@pytest.mark.parametrize("name", sorted({*ftjax.__all__} - PLAIN))
def test_the_examples_run(home, name):
    """The examples of a class's methods follow one another, and use what that of the class has made."""
    one = ftjax._function(name)
    parts = {name: one}
    if inspect.isclass(one):
        public = {key: value for key, value in vars(one).items() if not key.startswith("_") and inspect.isfunction(value)}
        parts |= {f"{name}.{key}": value for key, value in public.items()}
    known, said = {"ftjax": ftjax}, []
    for dotted, part in parts.items():
        test = doctest.DocTestParser().get_doctest(part.__doc__ or "", known, dotted, None, None)
        assert test.examples, dotted
        doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(test, out=said.append, clear_globs=False)
        known = test.globs
    assert not said, "".join(said)
