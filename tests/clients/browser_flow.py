"""A person at a keyboard in Debian's chromium: labels, skips, edits, and looks at every page.

    python browser_flow.py '{"url": ..., "people": {...}, "projects": {...}, "shots": ...}'

Prints what was seen as one JSON object.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from selenium import webdriver
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import WebDriverWait

WAIT_S = 30


class Person:
    """One browser; keys go to whatever has the focus, as they do at a desk."""

    def __init__(self, given: dict[str, Any], width: int = 1200, height: int = 850):
        options = webdriver.ChromeOptions()
        for word in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
            options.add_argument(word)
        options.binary_location = given["chromium"]
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        service = webdriver.ChromeService(given["chromedriver"])
        self.given = given
        self.driver = webdriver.Chrome(options, service)
        self.driver.set_window_size(width, height)
        self.faults: list[str] = []
        self.serious: dict[str, list[str]] = {}
        self.times: list[float] = []

    def open(self, path: str) -> None:
        self.driver.get(self.given["url"] + path)

    def sign_in(self, who: str) -> None:
        self.open("/web/login")
        self.look("login")
        self.focused().send_keys(self.given["people"][who])
        self.focused().send_keys(Keys.TAB)
        self.focused().send_keys(self.given["password"], Keys.ENTER)
        self.until(lambda: "Sign out" in self.text())

    def focused(self) -> WebElement:
        return self.driver.switch_to.active_element

    def press(self, *keys: str) -> None:
        self.focused().send_keys(*keys)

    def text(self) -> str:
        return self.driver.find_element(By.TAG_NAME, "body").text

    def task(self) -> str | None:
        """Return where the task's form goes."""
        found = self.driver.find_elements(By.ID, "task")
        return found[0].get_attribute("action") if found else None

    def answer(self, *keys: str) -> None:
        """Press keys that answer, and wait for the next page."""
        before, started = self.task(), time.perf_counter()
        self.press(*keys)
        self.until(lambda: self.task() != before)
        self.times.append(time.perf_counter() - started)

    def until(self, check: Any) -> None:
        WebDriverWait(self.driver, WAIT_S, 0.02, [Exception]).until(lambda _: check())

    def look(self, name: str) -> None:
        """Check the page with axe-core, note what the console says, and keep a picture."""
        axe = Path(self.given["axe"]).read_text("utf-8")
        self.driver.execute_cdp_cmd("Page.setBypassCSP", {"enabled": True})
        self.driver.execute_script(axe)
        run = "const done = arguments[0]; axe.run().then(done)"
        found = self.driver.execute_async_script(run)
        serious = [
            f"{entry['id']}: {entry['help']} ({entry['nodes'][0]['target']})"
            for entry in found["violations"]
            if entry["impact"] in ("serious", "critical")
        ]
        if serious:
            self.serious[name] = serious
        self.faults += [
            entry["message"]
            for entry in self.driver.get_log("browser")
            if entry["level"] == "SEVERE"
            and "favicon" not in entry["message"]
            and "status of 40" not in entry["message"]
        ]
        if self.given["shots"]:
            self.driver.save_screenshot(f"{self.given['shots']}/{name}.png")


def label(given: dict[str, Any]) -> dict[str, Any]:
    """Label 20 pairs by keys alone, skip one, edit one."""
    me, told = Person(given), {}
    me.sign_in("labeler")
    me.look("home")
    me.open(f"/web/label/{given['projects']['pairs']}")
    me.look("pair")
    me.press("?")
    me.until(lambda: me.driver.find_element(By.ID, "keys").get_property("open"))
    me.look("keys")
    me.press(Keys.ESCAPE)
    me.press("s")
    me.press("cannot tell", Keys.TAB)
    me.answer(Keys.ENTER)
    told["after_skip"] = "Skipped" in me.text()
    for number in range(20):
        good = me.driver.find_elements(By.CSS_SELECTOR, ".option")
        letter = next(o.get_attribute("data-letter") for o in good if "good" in o.text)
        me.answer("t" if number == 7 else letter.lower())
    me.open(f"/web/label/{given['projects']['pairs']}/progress")
    told["progress"] = me.text()
    me.look("progress")
    me.open(f"/web/label/{given['projects']['pairs']}/guidelines")
    me.look("guidelines")
    me.open(f"/web/label/{given['projects']['edits']}")
    me.focused().send_keys(Keys.CONTROL, Keys.END)
    me.focused().send_keys(" and more")
    me.until(lambda: "and more" in me.driver.find_element(By.CSS_SELECTOR, ".changes").text)
    me.look("edit")
    me.driver.delete_all_cookies()  # the session ends while there is typed text
    me.driver.switch_to.active_element.send_keys(Keys.CONTROL, Keys.ENTER)
    me.until(lambda: "Sign in" in me.text())
    me.focused().send_keys(given["people"]["labeler"])
    me.focused().send_keys(Keys.TAB)
    me.focused().send_keys(given["password"], Keys.ENTER)
    me.until(lambda: "Sign out" in me.text())
    me.open(f"/web/label/{given['projects']['edits']}")
    told["draft"] = me.driver.find_element(By.ID, "text").get_property("value")
    me.answer(Keys.CONTROL + Keys.ENTER)
    me.open(f"/web/label/{given['projects']['ranking']}")
    for letter, rank in (("a", "2"), ("b", "1"), ("c", "3")):
        me.press(letter)
        me.press(rank)
    me.look("ranking")
    me.answer(Keys.ENTER)
    me.open(f"/web/label/{given['projects']['likert']}")
    me.press("4")
    me.press("2")
    me.look("likert")
    me.answer(Keys.ENTER)
    me.answer("z")  # the last answer again, to change it
    me.until(lambda: "You have answered this: tone 4, facts 2" in me.text())
    me.look("change")
    me.press("5")
    me.answer(Keys.ENTER)
    told["changed"] = "Your answer was changed" in me.text()
    me.open(f"/web/label/{given['projects']['script']}")
    told["script_ran"] = me.driver.execute_script("return window.stolen === true")
    told["script_text"] = "<script>" in me.text()
    me.look("script")
    return finish(me, told)


def trouble(given: dict[str, Any]) -> dict[str, Any]:
    """Work in two tabs, click twice, and edit a long text of strange characters."""
    me, told = Person(given), {}
    me.sign_in("labeler")
    me.open(f"/web/label/{given['projects']['tabs']}")
    first, task = me.driver.current_window_handle, me.task()
    me.driver.switch_to.new_window("tab")
    me.open(f"/web/label/{given['projects']['tabs']}")
    told["same_task"] = me.task() == task
    me.answer("t")
    me.driver.switch_to.window(first)
    me.answer("x")
    told["other_tab"] = "The first answer stands" in me.text()
    before = me.task()
    button = me.driver.find_element(By.CSS_SELECTOR, '[data-press="t"]')
    ActionChains(me.driver).double_click(button).perform()
    me.until(lambda: me.task() != before)
    time.sleep(0.5)  # a second answer would have come by now
    me.open(f"/web/label/{given['projects']['tabs']}")
    told["after_two_clicks"] = me.text()
    me.open(f"/web/label/{given['projects']['strange']}")
    wide = "return document.documentElement.scrollWidth - window.innerWidth"
    told["too_wide"] = me.driver.execute_script(wide)
    me.look("strange")
    me.focused().send_keys(Keys.CONTROL, Keys.END)
    me.focused().send_keys("!")
    me.answer(Keys.CONTROL + Keys.ENTER)
    return finish(me, told)


def manage(given: dict[str, Any]) -> dict[str, Any]:
    """Look at the admin's pages."""
    me, told = Person(given, height=1400), {}
    me.sign_in("admin")
    me.open(f"/web/projects/{given['projects']['pairs']}")
    told["report"] = me.text()
    for name, path in (
        ("project", f"projects/{given['projects']['pairs']}"),
        ("new-project", "projects/new"),
        ("disagreements", f"projects/{given['projects']['pairs']}/disagreements"),
        ("disagreements-edit", f"projects/{given['projects']['edited']}/disagreements"),
        ("disagreements-likert", f"projects/{given['projects']['rated']}/disagreements"),
        ("rounds", "rounds"),
        ("models", "models"),
        ("jobs", "jobs"),
        ("job", f"jobs/{given['job']}"),
        ("playground", "playground"),
    ):
        me.open(f"/web/{path}")
        me.look(name)
    me.open(f"/web/projects/{given['projects']['rated']}/disagreements")
    me.press("3")
    me.press("4")
    me.press(Keys.ENTER)
    me.until(lambda: "None: where several people" in me.text())
    me.open(f"/web/projects/{given['projects']['pairs']}")
    me.driver.find_element(By.NAME, "prompts").send_keys("The cat")
    field = me.driver.find_element(By.NAME, "max_tokens")
    field.clear()
    field.send_keys("16", Keys.ENTER)
    me.until(lambda: "Saved." in me.text())
    told["drawn"] = me.text()
    me.open("/web/playground")
    me.driver.find_element(By.NAME, "prompt").send_keys("The cat")
    me.driver.find_element(By.CSS_SELECTOR, "button.main").click()
    me.until(lambda: "This one is better" in me.text())
    me.look("playground-answers")
    return finish(me, told)


def phone(given: dict[str, Any]) -> dict[str, Any]:
    """Look at a pair on a phone: nothing may be wider than the screen."""
    me = Person(given, 390, 844)
    me.sign_in("labeler")
    me.driver.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": 390, "height": 844, "deviceScaleFactor": 1, "mobile": True},
    )
    me.open(f"/web/label/{given['projects']['ranking']}")
    wide = "return document.documentElement.scrollWidth - window.innerWidth"
    told = {"too_wide": me.driver.execute_script(wide)}
    me.look("phone")
    return finish(me, told)


def finish(me: Person, told: dict[str, Any]) -> dict[str, Any]:
    me.driver.quit()
    return told | {"serious": me.serious, "console": me.faults, "times": me.times}


if __name__ == "__main__":
    said = json.loads(sys.argv[1])
    print(json.dumps({f.__name__: f(said) for f in (label, trouble, manage, phone)}))
