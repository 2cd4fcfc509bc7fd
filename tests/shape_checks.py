"""Checks the shapes in annotations of ftjax (jaxtyping) with beartype, while the tests run.

jaxtyping's own import hook wraps every function, and inner ones each time they are defined, which slows the tests by a tenth.
This one wraps only functions and dataclasses whose annotations name a shape. Calls of a compiled function are checked while JAX
traces it. NumPy's arrays pass for JAX's: it is their shapes and dtypes that count.
"""

import ast
import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import PathFinder, SourceFileLoader

import jaxtyping
from beartype import beartype

# Called by the code that `Checks` inserts.
checked = jaxtyping.jaxtyped(typechecker=beartype)


class Checks(ast.NodeTransformer):
    """Decorates with `checked` what has an annotation with one of the names that the file imports from jaxtyping."""

    def __init__(self, tree: ast.Module):
        imports = [node for node in tree.body if isinstance(node, ast.ImportFrom) and node.module == "jaxtyping"]
        self.names = {alias.name for node in imports for alias in node.names} - {"Array"}
        for alias in (alias for node in imports for alias in node.names if alias.name == "Array"):
            alias.name, alias.asname = "ArrayLike", "Array"

    def _shaped(self, hints: list[ast.expr | None]) -> bool:
        return any(isinstance(n, ast.Name) and n.id in self.names for hint in hints if hint for n in ast.walk(hint))

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.FunctionDef:
        self.generic_visit(node)
        if self._shaped([node.returns, *(arg.annotation for arg in ast.walk(node.args) if isinstance(arg, ast.arg))]):
            node.decorator_list.append(_decorator(node))  # innermost: jax.custom_vjp and others keep their methods
        return node

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.ClassDef:
        self.generic_visit(node)
        if self._shaped([field.annotation for field in node.body if isinstance(field, ast.AnnAssign)]):
            node.decorator_list.insert(0, _decorator(node))  # outermost: `dataclass` has written `__init__`
        return node


def _decorator(node: ast.AST) -> ast.expr:
    return ast.copy_location(ast.parse("__import__('shape_checks').checked", mode="eval").body, node)


class _Loader(SourceFileLoader):
    def get_code(self, fullname: str):
        """Compile the source with checks, if it names shapes; past the cache, which has the code without them."""
        source = self.get_data(self.path)
        if b"from jaxtyping import" not in source:
            return super().get_code(fullname)
        tree = ast.parse(source)
        return compile(ast.fix_missing_locations(Checks(tree).visit(tree)), self.path, "exec", dont_inherit=True)


class _Finder(MetaPathFinder):
    def find_spec(self, fullname: str, path=None, target=None):
        if not fullname.startswith("ftjax."):
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and isinstance(spec.loader, SourceFileLoader):
            spec.loader = _Loader(spec.loader.name, spec.loader.path)
        return spec


def install() -> None:
    """Check all modules of ftjax that are imported from here on."""
    sys.meta_path.insert(0, _Finder())
