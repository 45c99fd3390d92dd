"""Code for an instruction set must be reached through its table of kernels, and in no other way."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("elftools")
from elftools.elf.elffile import ELFFile

# A pointer, not code: where the routine that unwinds exceptions lies.
HARMLESS = {"DW.ref.__gxx_personality_v0"}


@pytest.fixture(scope="module")
def objects(build_dir: Path) -> list[tuple[str, ELFFile]]:
    paths = sorted(build_dir.glob("CMakeFiles/kernels_*.dir/csrc/*.o"))
    if not paths:
        pytest.skip("no object files: the kernels were not compiled here")
    return [(path.parts[-3].removeprefix("kernels_").removesuffix(".dir"), _elf(path)) for path in paths]


def _elf(path: Path) -> ELFFile:
    return ELFFile(path.open("rb"))


def _defined(elf: ELFFile) -> Iterator[str]:
    """Names that the linker sees from outside: of those that are weak it keeps one, whoever compiled it."""
    for symbol in elf.get_section_by_name(".symtab").iter_symbols():
        if symbol["st_shndx"] != "SHN_UNDEF" and symbol["st_info"]["bind"] != "STB_LOCAL":
            yield symbol.name


def test_no_symbol_is_shared_between_instruction_sets(objects):
    # A std::vector in a kernel is enough: its functions are weak, and the linker may keep the copy that was
    # compiled for AVX-512 for the whole module.
    shared = {
        name
        for instruction_set, elf in objects
        for name in _defined(elf)
        if f"15million_experts{len(instruction_set)}{instruction_set}" not in name and name not in HARMLESS
    }
    assert not shared


def test_nothing_of_an_instruction_set_runs_when_the_module_is_loaded(objects):
    initialisers = {
        (instruction_set, section.name)
        for instruction_set, elf in objects
        for section in elf.iter_sections()
        if section.name.startswith((".init_array", ".ctors", ".preinit_array"))
    }
    assert not initialisers
