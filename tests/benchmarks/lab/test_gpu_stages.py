"""What the stages of on_this_gpu.py name is there, and what they read from the logs of their processes."""

from lab.gpu_stages import ROOT, STAGES, TESTS, Room, read_tuning


def test_files_of_tests_and_scripts_exist(tmp_path):
    assert [name for name in TESTS if not (ROOT / "tests" / name).is_file()] == []
    room = Room(tmp_path, tmp_path, 60.0)
    [scripts] = zip(*(STAGES[name].commands(room) for name in ("attention", "head", "step")), strict=True)
    assert [command[1].name for command in scripts if command[1].is_file()] == [
        "bench_thought_attention.py",
        "bench_lm_head.py",
        "bench_llama_step.py",
    ]


def test_read_tuning_finds_the_tile_of_the_table_and_the_chosen_one():
    log = (
        "a card (sm_90)\n\nforward, bfloat16, width 128: 2 of 3 candidates fit and ran\n"
        "     0.900 ms  128x32 w8 s2 (chosen)\n     1.000 ms  64x32 w8 s2 (the table's)\n"
        "\nstep, bfloat16, width 128: 1 of 3 candidates fit and ran\n"
        "     2.000 ms  64x32 w8 s2 (the table's) (chosen)\n"
    )
    assert read_tuning(None, [log]) == {
        "kernels": {
            "forward, bfloat16, width 128": {
                "chosen": "128x32 w8 s2: 0.900 ms",
                "the table's": "64x32 w8 s2: 1.000 ms",
            },
            "step, bfloat16, width 128": {"chosen": "64x32 w8 s2: 2.000 ms", "the table's": "64x32 w8 s2: 2.000 ms"},
        }
    }
