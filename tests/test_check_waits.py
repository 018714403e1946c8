"""csrc/cuda/check_waits.py, on machine code as cuobjdump prints it."""

import pathlib
import runpy

import pytest

PATH = pathlib.Path(__file__).parents[1] / "csrc" / "cuda" / "check_waits.py"


def waits(lines: list[str]) -> list[str]:
    code = "\tcode for sm_90a\n\t\tFunction : kernel\n"
    for i, line in enumerate(lines):
        code += f"        /*{16 * i:04x}*/                   {line} ;   /* 0x0000000402027824 */\n"
        code += "                                              /* 0x000fe200078e00ff */\n"
    return list(runpy.run_path(str(PATH))["waits"](code))


ASKED = "@!P2 ATOMG.E.OR.STRONG.GPU PT, R24, desc[UR30][R2.64], R4"
OTHERS = ["IMAD.MOV.U32 R5, RZ, RZ, R2", "BAR.ARV 0x2, 0xa0", "VIADD R240, R2, 0x1"] * 3


@pytest.mark.parametrize(
    ("lines", "found"),
    [
        ([ASKED, "IMAD.MOV.U32 R16, RZ, RZ, R24"], 1),
        ([ASKED, OTHERS[0], "@P1 LOP3.LUT R28, R24, 0x1, RZ, 0xc0, !PT"], 1),
        ([ASKED, *OTHERS, "IMAD.MOV.U32 R16, RZ, RZ, R24"], 0),
        ([ASKED, *OTHERS], 0),
        (["ATOMG.E.ADD.STRONG.GPU PT, R3, desc[UR30][R2.64], R5", "VIADD R12, R3, 0x1"], 0),
    ],
)
def test_waits(lines, found):
    assert len(waits(lines)) == found
