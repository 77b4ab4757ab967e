// Keys, ranks by dragging, changes of an edit, timings, and drafts that survive a lost session.
// Every page works without this file.
"use strict";
(() => {
  const IDLE_MS = 30000;
  let started = 0, first = 0, active = 0, last = 0;

  const task = () => document.getElementById("task");
  const typing = (node) => node && (node.matches("textarea, select") ||
    (node.matches("input") && !["radio", "checkbox"].includes(node.type)));

  function begin() {
    started = last = performance.now();
    first = active = 0;
    const form = task(), asked = document.querySelector("[autofocus]");
    if (asked) asked.focus();
    if (!form) return;
    if (form.dataset.kind === "ranking") sortable(form);
    if (form.dataset.kind === "edit") editable(form);
    const focus = form.querySelector("textarea, .option .text");
    if (focus && document.activeElement === document.body) focus.focus({ preventScroll: true });
  }

  function notice() {
    const now = performance.now();
    if (!first) first = now;
    active += Math.min(now - last, IDLE_MS);
    last = now;
  }

  function stamp(form) {
    notice();
    const found = { first_input_ms: first - started, active_ms: active, total_ms: performance.now() - started };
    for (const [name, value] of Object.entries(found)) {
      if (form.elements[name]) form.elements[name].value = Math.round(value);
    }
    if (form.dataset.key) sessionStorage.setItem("sent", form.dataset.key);
  }

  document.addEventListener("submit", (event) => {
    if (event.target === task()) stamp(event.target);
  }, true);  // before htmx reads the form

  // ---- keys ----

  document.addEventListener("keydown", (event) => {
    notice();
    const form = task(), keys = document.getElementById("keys"), here = document.activeElement;
    if (event.altKey || event.metaKey || (keys && keys.open)) return;
    if (event.repeat && !typing(here)) return;  // a key that is held answers one task
    if (event.key === "Enter" && form && (event.ctrlKey || form.dataset.kind === "ranking" || form.dataset.kind === "likert")) {
      if (here && here.matches("button, summary, a")) return;
      const send = form.querySelector('[data-press="Enter"]');
      if (send) { event.preventDefault(); send.click(); }
      return;
    }
    if (event.ctrlKey) return;
    const key = event.key.toLowerCase();
    if (form && form.dataset.kind === "ranking" && rankKey(form, event, key)) return;
    if (typing(here)) return;
    if (form && form.dataset.kind === "likert" && /^[1-7]$/.test(key)) return rate(form, key);
    if (key === "?") return keys && keys.showModal();
    if (key === "s") {
      const box = document.querySelector('[data-open="s"]');
      if (box) { event.preventDefault(); box.open = true; box.querySelector("input").focus(); }
      return;
    }
    const button = form && document.querySelector(`[data-press="${CSS.escape(key)}"]`);
    if (button) { event.preventDefault(); button.click(); }
  });
  document.addEventListener("pointerdown", notice);
  document.addEventListener("click", (event) => {
    if (event.target.closest("[data-help]")) document.getElementById("keys").showModal();
  });

  function rankKey(form, event, key) {
    const field = form.elements[`rank-${key.toUpperCase()}`];
    if (/^[a-i]$/.test(key) && field) {
      event.preventDefault();
      field.focus();
      field.select();
      return true;
    }
    return false;
  }

  function rate(form, key) {
    const axes = [...form.querySelectorAll(".axis")];
    const inside = axes.findIndex((axis) => axis.contains(document.activeElement));
    const open = axes.findIndex((axis) => !axis.querySelector(":checked"));
    const axis = axes[inside >= 0 && !axes[inside].querySelector(":checked") ? inside : Math.max(open, 0)];
    const choice = axis.querySelector(`[value="${key}"]`);
    if (choice) { choice.checked = true; choice.focus(); }
  }

  // ---- ranking by dragging ----

  function sortable(form) {
    const box = form.querySelector(".options");
    let held = null;
    box.addEventListener("dragstart", (event) => { held = event.target.closest(".option"); });
    box.addEventListener("dragover", (event) => {
      const over = event.target.closest(".option");
      if (!held || !over || over === held) return;
      event.preventDefault();
      const before = [...box.children].indexOf(held) > [...box.children].indexOf(over);
      box.insertBefore(held, before ? over : over.nextSibling);
    });
    box.addEventListener("drop", (event) => event.preventDefault());
    box.addEventListener("dragend", () => {
      [...box.children].forEach((option, place) => { option.querySelector("input").value = place + 1; });
      held = null;
      notice();
    });
  }

  // ---- edits ----

  function editable(form) {
    const field = form.elements.text, shown = form.querySelector(".changes");
    const name = `draft-${form.dataset.key}`;
    const draft = sessionStorage.getItem(name);
    if (draft !== null && draft !== field.dataset.original) field.value = draft;
    const update = () => {
      sessionStorage.setItem(name, field.value);
      draw(shown, words(field.dataset.original), words(field.value));
    };
    field.addEventListener("input", update);
    update();
  }

  const words = (text) => text.match(/\s+|[^\s]+/g) || [];

  function draw(shown, before, after) {
    shown.replaceChildren();
    if (before.length * after.length > 4e6 || before.join("") === after.join("")) return;
    const rows = before.length + 1, columns = after.length + 1;
    const common = Array.from({ length: rows }, () => new Uint16Array(columns));
    for (let i = rows - 2; i >= 0; i--) {
      for (let j = columns - 2; j >= 0; j--) {
        common[i][j] = before[i] === after[j] ? common[i + 1][j + 1] + 1 : Math.max(common[i + 1][j], common[i][j + 1]);
      }
    }
    const put = (tag, text) => {
      const node = tag ? document.createElement(tag) : document.createTextNode(text);
      if (tag) node.textContent = text;
      shown.append(node);
    };
    let i = 0, j = 0;
    while (i < before.length || j < after.length) {
      if (i < before.length && j < after.length && before[i] === after[j]) { put("", after[j]); i++; j++; }
      else if (j < after.length && (i === before.length || common[i][j + 1] >= common[i + 1][j])) put("ins", after[j++]);
      else put("del", before[i++]);
    }
  }

  window.addEventListener("beforeunload", (event) => {
    const form = task(), field = form && form.elements.text;
    const sent = form && sessionStorage.getItem("sent") === form.dataset.key;
    if (field && !sent && field.value !== field.dataset.original) event.preventDefault();
  });

  document.addEventListener("htmx:afterSettle", begin);
  if (document.readyState === "loading") document.addEventListener("DOMContentLoaded", begin);
  else begin();
})();
