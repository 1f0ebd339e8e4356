"""`python -m vllm_npu.emulator`: run a script, or another project's tests, on emulated devices; build, report, clean up."""

import argparse
import sys
from pathlib import Path

from vllm_npu import envs
from vllm_npu.emulator import build, judge, launcher, report, shared_memory, soc, startup
from vllm_npu.errors import VllmNpuError


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m vllm_npu.emulator", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)

    run = commands.add_parser("run", help="run a script in one or more processes, each with an emulated device")
    run.add_argument("--nproc", type=int, default=1, metavar="N", help="number of ranks (default: 1)")
    families = ", ".join(f"{family.name} = {family.default_soc}" for family in soc.FAMILIES)
    run.add_argument("--soc", default=envs.EMULATOR_SOC.read(), help=f"the chip, or its family: {families}")
    run.add_argument("--trace", action="store_true", help="list the calls of ACL, HCCL and aclnn on standard error")
    run.add_argument("-m", dest="module", action="store_true", help="SCRIPT is the name of a module")
    run.add_argument("script", help="a Python file, or a module with -m")
    run.add_argument("arguments", nargs=argparse.REMAINDER, help="arguments of the script")

    commands.add_parser("build", help="build the libraries if they are missing, and print their folder")
    compare = commands.add_parser(
        "report", help="list which functions and operators of the installed torch_npu are emulated"
    )
    compare.add_argument("--json", type=Path, metavar="PATH", help="write every name and its state to this file")
    tests = commands.add_parser("judge", help="run another project's tests on the emulated device")
    tests.add_argument("--suite", required=True, help=f"a folder of tests, or one of {', '.join(judge.SUITES)}")
    tests.add_argument("--folder", type=Path, help="the sources of a named suite, with its tests")
    tests.add_argument(
        "--only", action="append", default=[], metavar="GLOB", help="files in the tests' folder (may be repeated)"
    )
    tests.add_argument("--skip", action="append", default=[], metavar="GLOB", help="files not to run (may be repeated)")
    tests.add_argument("--jobs", type=int, default=1, metavar="N", help="files at a time (default: 1)")
    tests.add_argument(
        "--json", type=Path, required=True, metavar="PATH", help="the result; its files are not run again"
    )
    tests.add_argument("--again", action="store_true", help="run files again that the result has already")
    tests.add_argument(
        "--compare", type=Path, metavar="PATH", help="an earlier result: show new failures and mended ones"
    )
    tests.add_argument(
        "--with-plugin",
        action="store_true",
        help="of vllm-ascend's suite: vllm_npu's platform in place of vllm-ascend's",
    )
    tests.add_argument("--soc", default=envs.EMULATOR_SOC.read(), help="as of `run`")
    tests.add_argument(
        "--no-fork",
        action="store_true",
        help="a new interpreter for each process that a test spawns, and for each file of vllm-ascend's suite, which is slower",
    )
    quiet = "on a machine without other load; a load makes it longer"
    tests.add_argument("--test-seconds", type=float, default=300, metavar="S", help=f"limit of a test (300), {quiet}")
    tests.add_argument("--file-seconds", type=float, default=1800, metavar="S", help=f"limit of a file (1800), {quiet}")
    commands.add_parser("clean", help="remove shared memory that killed processes left behind")
    commands.add_parser("hook", help="print the line of a .pth file that makes VLLM_NPU_EMULATOR=1 work everywhere")
    return parser.parse_args(arguments)


def execute(options: argparse.Namespace) -> int:
    if options.command == "run":
        if options.nproc < 1:
            raise SystemExit("run: --nproc is the number of ranks, 1 or more")
        command = [*(["-m"] if options.module else []), options.script, *options.arguments]
        return launcher.run(launcher.Launch(command, options.nproc, options.soc, options.trace))
    if options.command == "judge":
        if options.jobs < 1:
            raise SystemExit("judge: --jobs is the number of files that run at a time, 1 or more")
        return judge.judge(
            judge.Job(
                suite=options.suite,
                folder=options.folder,
                only=tuple(options.only),
                skip=tuple(options.skip),
                jobs=options.jobs,
                json=options.json,
                compare=options.compare,
                soc_name=options.soc,
                test_seconds=options.test_seconds,
                file_seconds=options.file_seconds,
                again=options.again,
                fork=not options.no_fork,
                with_plugin=options.with_plugin,
            )
        )
    if options.command == "build":
        print(build.build())
    elif options.command == "report":
        made = report.make_report()
        if options.json is not None:
            options.json.write_text(report.as_json(made))
        print(report.as_text(made))
        return 1 if made.import_fault else 0
    elif options.command == "clean":
        for name in shared_memory.clean_leftovers():
            print(f"removed {shared_memory.FOLDER / name}")
    else:
        print(startup.PTH_LINE)
    return 0


def main() -> int:
    options = parse(sys.argv[1:])
    try:
        return execute(options)
    except VllmNpuError as error:
        print(f"vllm_npu emulator: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
