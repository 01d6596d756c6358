"""Execute one notebook: papermill with a client that does not hang on widgets, names a slow cell and measures memory."""

import contextlib
import os
import tempfile
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nbformat
import papermill
import psutil
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
from nbformat import NotebookNode
from papermill.clientwrap import PapermillNotebookClient
from papermill.engines import Engine, NotebookExecutionManager, papermill_engines
from papermill.exceptions import PapermillExecutionError

from tools.course import first_line

WIDGET = "application/vnd.jupyter.widget-view+json"
ADDED_TAGS = {"injected-parameters", "papermill-error-cell-tag"}
METADATA = {
    "kernelspec": {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"},
    "language_info": {"file_extension": ".py", "mimetype": "text/x-python", "name": "python", "pygments_lexer": "ipython3"},
}


@dataclass(frozen=True)
class Outcome:
    """An executed notebook (up to its failure), the failure in one line or None, its seconds and peak kernel memory in MB."""

    notebook: NotebookNode
    error: str | None
    seconds: float
    memory: int


class CourseClient(PapermillNotebookClient):
    """papermill's client, with its own ending for cells that take too long."""

    def __init__(self, manager: NotebookExecutionManager, **options: Any) -> None:
        super().__init__(manager, **options)
        self.widget_registry: dict[str, Any] = {}  # the stand-in for ipywidgets.Output hangs now and then (nbclient issue 312)

    def execute(self, **kernel: Any) -> NotebookNode:
        """Run all cells in a fresh kernel and note its peak memory."""
        self.reset_execution_trackers()
        with self.setup_kernel(**kernel):
            done = threading.Event()
            watcher = threading.Thread(target=self._watch, args=(self.km.provisioner.pid, done), daemon=True)
            watcher.start()
            # papermill's own execute() ends with a question to the kernel, which one that is busy with a slow cell never answers
            self.papermill_execute_cells()
            done.set()
            watcher.join()
        return self.nb

    def _watch(self, pid: int, done: threading.Event) -> None:
        peak = 0
        ended = False
        while not ended:
            ended = done.wait(0.2)
            with contextlib.suppress(psutil.Error):  # a worker may end between listing and looking
                kernel = psutil.Process(pid)
                peak = max(peak, sum(process.memory_info().rss for process in [kernel, *kernel.children(recursive=True)]))
        self.nb.metadata.papermill["memory"] = peak

    def execute_cell(self, cell: NotebookNode, cell_index: int, **options: Any) -> NotebookNode:
        """Run a cell; turn a timeout or a dead kernel into an ordinary cell failure, so that the notebook is kept."""
        try:
            return super().execute_cell(cell, cell_index, **options)
        except (CellTimeoutError, DeadKernelError) as error:
            timeout = isinstance(error, CellTimeoutError)
            name = "CellTimeout" if timeout else "DeadKernel"
            message = f"the cell was ended after {self.timeout} s" if timeout else "the kernel died (out of memory?)"
            cell.outputs.append(nbformat.v4.new_output("error", ename=name, evalue=message, traceback=[f"{name}: {message}"]))
            self.shutdown_kernel = "immediate"
            raise CellExecutionError(message, name, message) from None


class CourseEngine(Engine):
    """The papermill engine "course"."""

    @classmethod
    def execute_managed_notebook(cls, nb_man: NotebookExecutionManager, kernel_name: str, **options: Any) -> None:
        """Run the notebook in `options["folder"]` with the variables `options["env"]` added to the environment."""
        client = CourseClient(
            nb_man,
            kernel_name=kernel_name,
            timeout=options["timeout"],
            iopub_timeout=60,  # the default of 4 s fails on busy machines
            coalesce_streams=True,  # how a kernel cuts its prints into messages is chance
            store_widget_state=False,
            record_timing=False,
            extra_arguments=["--IPKernelApp.log_level=40"],  # errors only
            resources={"metadata": {"path": str(options["folder"])}},
        )
        client.execute(env={**os.environ, **options["env"]})


papermill_engines.register("course", CourseEngine)


def execute(
    notebook: NotebookNode,
    folder: Path,
    parameters: Mapping[str, Any] | None = None,
    timeout: int = 300,
    env: Mapping[str, str] | None = None,
) -> Outcome:
    """Execute a copy of `notebook` in `folder`; `timeout` is in seconds a cell. A failing cell raises nothing: see `error`."""
    error = None
    with tempfile.TemporaryDirectory() as scratch:
        output = Path(scratch, "executed.ipynb")
        try:
            papermill.execute_notebook(
                notebook,
                output,
                parameters=dict(parameters or {}),
                engine_name="course",
                kernel_name="python3",
                progress_bar=False,
                request_save_on_cell_execute=False,
                timeout=timeout,
                folder=folder,
                env=env or {},
            )
        except PapermillExecutionError as failure:
            reason = next(iter(failure.evalue.splitlines()), "")
            place = f"In [{failure.exec_count}]" if failure.exec_count else failure.cell_index + 1
            error = f"cell {place} {first_line(failure.source)!r}: {failure.ename}: {reason}"
        executed = nbformat.read(output, as_version=4)
    facts = executed.metadata.papermill
    return Outcome(clean(executed), error, facts["duration"], round(facts.get("memory", 0) / 2**20))


def clean(notebook: NotebookNode) -> NotebookNode:
    """Drop, in place, what changes from run to run: timings, paths, papermill's random ids, widgets that lost their kernel."""
    course = notebook.metadata.get("course")
    notebook.metadata = nbformat.from_dict({**METADATA, **({"course": course} if course else {})})
    for index, cell in enumerate(notebook.cells):
        if ADDED_TAGS & set(cell.metadata.get("tags", [])):
            cell.id = f"added-{index}"
        cell.metadata = nbformat.from_dict({key: cell.metadata[key] for key in ("tags", "jupyter") if cell.metadata.get(key)})
        for output in cell.get("outputs", []):
            if output.get("data", {}).pop(WIDGET, None) is not None:
                output.data.pop("text/plain", None)  # the widget's repr
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("data", True)]
    return notebook
