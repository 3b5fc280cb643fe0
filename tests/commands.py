"Runs `ct-nb` in this process."

from ct_nb.app.cli import app
from typer.testing import CliRunner


def ct_nb(*words, exit_code: int = 0):
    "The result of `ct-nb WORDS` (stdout, stderr, output); fails for another exit code."
    result = CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)
    assert result.exit_code == exit_code, f"ct-nb {' '.join(map(str, words))}\n{result.output}"
    return result


def refusal(*words) -> str:
    "The one sentence on stderr with which `ct-nb WORDS` ends, exit code 1."
    result = ct_nb(*words, exit_code=1)
    lines = result.stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith(f"ct-nb {words[0]}: "), result.output
    return lines[0].removeprefix(f"ct-nb {words[0]}: ")
