"""Every explorer as a reader meets it: opened, run, played with."""

import re

import lab


def opened(reader, name: str, folder: str = "fresh") -> lab.OpenNotebook:
    "An explorer that has run, its first picture in time and shown in full."
    notebook = reader(f"{folder}/nbs/{name}.ipynb")
    assert notebook.run_all() < lab.FIRST_PICTURE_S
    notebook.page.locator(".ct-nb-picture").first.scroll_into_view_if_needed()
    return notebook


def check_change(notebook: lab.OpenNotebook, name: str, act, new_pixels: bool = True) -> None:
    """The picture of this name looks different soon after `act`; `new_pixels`: because other pixels
    were sent, not other marks.
    """
    before = notebook.frame(name)
    assert notebook.seconds_to_change(notebook.picture(name), act) < lab.CLICK_S
    assert (notebook.frame(name) != before) == new_pixels, name


def press(notebook: lab.OpenNotebook, name: str, x: float, y: float):
    "A press at a share of the picture's width and height."

    def act():
        box = notebook.picture(name).bounding_box()
        notebook.picture(name).click(position={"x": x * box["width"], "y": y * box["height"]})

    return act


def turn(notebook: lab.OpenNotebook, name: str, notches: int = 3):
    def act():
        notebook.picture(name).hover()
        notebook.page.mouse.wheel(0, -100 * notches)

    return act


def test_ct(reader):
    notebook = opened(reader, "explore_ct")
    notebook.save("explore_ct")
    check_change(notebook, "coronal", press(notebook, "axial", 0.4, 0.7))
    check_change(notebook, "axial", turn(notebook, "axial"))
    check_change(notebook, "sagittal", lambda: notebook.slider("sagittal").press("PageUp"))
    check_change(notebook, "axial", lambda: notebook.menu("window").select_option(label="bone"))
    check_change(notebook, "coronal", lambda: notebook.slider("mask").press("Home"))
    said = notebook.page.locator(".widget-html-content", has_text="HU").first.inner_text()
    notebook.picture("axial").hover(position={"x": 40, "y": 90})
    notebook.settle()
    assert notebook.page.locator(".widget-html-content", has_text="mm:").first.inner_text() != said
    notebook.check()


def test_xrays(reader):
    notebook = opened(reader, "explore_xrays")
    notebook.save("explore_xrays")
    check_change(notebook, "view 0", lambda: notebook.slider("azimuth, °").press("PageUp"))
    # its epipolar line
    check_change(notebook, "view 1", press(notebook, "view 0", 0.3, 0.4), new_pixels=False)
    check_change(notebook, "view 1", lambda: notebook.slider("source, mm", 1).press("PageDown"))

    def drag():
        box = notebook.picture("scene").bounding_box()
        x = box["x"] + box["width"] / 2
        y = box["y"] + box["height"] / 2
        notebook.page.mouse.move(x, y), notebook.page.mouse.down(), notebook.page.mouse.move(
            x + 60, y, steps=3
        ), notebook.page.mouse.up()

    check_change(notebook, "scene", drag)


def test_registration(reader):
    """A drag brings the CT nearer to its X-rays, *register* finds the pose to 2 mm, and
    *reconstruct* shows the atlas at that pose.
    """
    notebook = opened(reader, "explore_registration")
    page = notebook.page
    notebook.save("explore_registration")
    status = page.locator(".widget-html-content", has_text="from the true pose")

    def said() -> tuple[float, float]:
        "The similarity, and the distance from the true pose in mm."
        found = re.search(r"\) (\d\.\d+).*; ([\d.]+) mm from", status.inner_text())
        return float(found[1]), float(found[2])

    def press_button(name: str):
        return page.get_by_role("button", name=name, exact=True).click

    def drag(right: int, down: int):
        def act():
            box = notebook.picture("view 0").bounding_box()
            x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
            page.mouse.move(x, y)
            page.mouse.down()
            page.mouse.move(x + right, y + down, steps=5)
            page.mouse.up()

        return act

    start = said()
    check_change(notebook, "view 0", drag(-15, 14))
    nearer = said()
    assert nearer[0] > start[0] + 0.05 and nearer[1] < start[1] - 5
    check_change(notebook, "view 1", turn(notebook, "view 0"))
    check_change(notebook, "view 0", lambda: notebook.slider("head, mm").press("PageUp"))
    page.get_by_role("button", name="tilt", exact=True).click()
    check_change(notebook, "view 1", drag(20, 0))
    check_change(
        notebook, "view 0", lambda: notebook.menu("show").select_option(label="checkerboard")
    )
    notebook.menu("show").select_option(label="both in colour")
    notebook.settle()
    assert said()[1] > 2
    notebook.save("explore_registration_dragged")
    press_button("register")()
    page.get_by_text("Accepted: nothing speaks against this pose.").wait_for()
    notebook.settle()
    found = said()
    assert found[1] < 2 and found[0] > 0.8 and found[0] > nearer[0]
    assert page.get_by_text("all views: turned by").count() == 1
    notebook.save("explore_registration_found")
    press_button("reconstruct")()
    page.get_by_text("Reconstructed from the atlas").wait_for()
    notebook.settle()
    check_change(notebook, "reconstruction", press_button("axial"))
    notebook.save("explore_registration_reconstructed")
    check_change(notebook, "view 0", press_button("reset"))
    assert said() == start
    notebook.check()


def test_reconstruction(reader):
    notebook = opened(reader, "explore_reconstruction")
    notebook.save("explore_reconstruction")
    check_change(notebook, "CT", lambda: notebook.slider("slice").press("PageUp"))
    check_change(
        notebook, "CT", lambda: notebook.page.get_by_role("button", name="coronal").click()
    )
    # the place is marked in all
    check_change(notebook, "minimum norm", press(notebook, "CT", 0.6, 0.4), new_pixels=False)
    # whose X-rays are those of the floors to less than a grey level
    notebook.menu("X-rays of").select_option(label="CT")
    notebook.page.locator('[data-ct-nb="view 0 projected"] .ct-nb-title').get_by_text(
        "of CT", exact=True
    ).wait_for()
    check_change(notebook, "CT", lambda: notebook.menu("window").select_option(label="lung"))


def test_steps(reader):
    notebook = opened(reader, "explore_steps")
    page = notebook.page
    notebook.save("explore_steps")
    check_change(
        notebook,
        "axial",
        page.locator("button.ct-nb-step", has_text="right middle lobe").first.click,
    )
    assert (
        page.locator("button.ct-nb-chosen").count() == 1
        and "right middle lobe" in page.locator("button.ct-nb-chosen").inner_text()
    )
    check_change(notebook, "coronal", press(notebook, "axial", 0.35, 0.5))
    check_change(
        notebook,
        "axial",
        lambda: notebook.menu("method").select_option(label="untrained encoder (chance)"),
    )
    assert (
        "papermill nbs/train_ct_encoder.ipynb"
        in page.locator(".jp-OutputArea-output", has_text="no trained encoder").last.inner_text()
    )
    own = page.get_by_placeholder("your own sentence")
    notebook.menu("method").select_option(label="named region (baseline)")
    own.fill("There is fluid around the heart.")
    check_change(notebook, "sagittal", lambda: own.press("Enter"))
    assert "around the heart" in page.locator("button.ct-nb-chosen").inner_text()
    check_change(
        notebook, "axial", lambda: notebook.menu("scan").select_option(label="phantom-02002")
    )
    notebook.save("explore_steps_later")


def test_slices(reader):
    notebook = opened(reader, "explore_slices")
    notebook.save("explore_slices")
    check_change(notebook, "thick", lambda: notebook.slider("thick, mm").press("PageUp"))
    check_change(
        notebook, "prediction", lambda: notebook.menu("method").select_option(label="linear")
    )
    check_change(notebook, "truth", turn(notebook, "truth"))
    check_change(
        notebook,
        "profile",
        lambda: notebook.picture("truth").hover(position={"x": 90, "y": 150}),
        new_pixels=False,
    )
    # the finger
    check_change(notebook, "thick", press(notebook, "difference", 0.7, 0.3), new_pixels=False)
    check_change(
        notebook, "difference", lambda: notebook.menu("cut").select_option(label="sagittal")
    )
    check_change(
        notebook, "thick", lambda: notebook.menu("scan").select_option(label="phantom-01002")
    )
    notebook.save("explore_slices_later")


def test_steps_with_weights(reader):
    notebook = opened(reader, "explore_steps", "trained")
    for name in ("named region (baseline)", "encoder, scan only"):
        check_change(
            notebook, "axial", lambda name=name: notebook.menu("method").select_option(label=name)
        )
    assert notebook.menu("scan").locator("option", has_text="training scan").count() == 1
    assert (
        "papermill"
        not in notebook.page.locator(".widget-html-content", has_text="correlation").inner_text()
    )


def test_slices_with_weights(reader):
    notebook = opened(reader, "explore_slices", "trained")
    for name in ("regressor", "linear", "diffusion, one sample"):
        check_change(
            notebook,
            "prediction",
            lambda name=name: notebook.menu("method").select_option(label=name),
        )
        # a network's start stands in its place until it answers
        notebook.page.locator('[data-ct-nb="prediction"] .ct-nb-title').get_by_text(
            name, exact=True
        ).wait_for()
    notebook.slider("thick, mm").press("End")
    notebook.settle()
    assert (
        "outside the tested range"
        in notebook.page.locator(".widget-html-content", has_text="averaged again").inner_text()
    )
    notebook.check()


def test_reconstruction_with_weights(reader):
    """Coarse, refined, samples and their spread beside the truth: a sample, a slice and a window
    that are chosen are shown, in residual maps too.
    """
    notebook = opened(reader, "explore_reconstruction", "trained")
    notebook.save("explore_reconstruction_trained")
    assert (
        "papermill"
        not in notebook.page.locator(".jp-OutputArea-output", has_text="shown:").first.inner_text()
    ), "nothing is missing"
    before = {
        name: notebook.frame(name)
        for name in ("error of one sample", "error of coarse", "mean of samples")
    }
    check_change(
        notebook,
        "one sample",
        lambda: notebook.page.locator(".widget-dropdown select")
        .filter(has=notebook.page.locator("option", has_text="sample 1"))
        .select_option(label="sample 1"),
    )
    assert [notebook.frame(name) != digest for name, digest in before.items()] == [
        True,
        False,
        False,
    ], "its own error, and nobody else's"
    for name in ("standard deviation", "error of refined", "error of mean of samples, size"):
        check_change(notebook, name, lambda: notebook.slider("slice").press("PageUp"))
    check_change(
        notebook,
        "error of coarse",
        lambda: notebook.page.get_by_role("button", name="sagittal").click(),
    )
    spread = notebook.frame("standard deviation")
    check_change(notebook, "refined", lambda: notebook.menu("window").select_option(label="lung"))
    assert notebook.frame("standard deviation") == spread, "a window is for Hounsfield units"
    before = notebook.frame("view 0 difference")
    # all of them explain the X-rays, to less than the eye sees
    notebook.menu("X-rays of").select_option(label="coarse")
    notebook.page.locator('[data-ct-nb="view 0 projected"] .ct-nb-title').get_by_text(
        "of coarse", exact=True
    ).wait_for()
    notebook.settle()
    assert notebook.frame("view 0 difference") != before
    notebook.save("explore_reconstruction_trained_later")
