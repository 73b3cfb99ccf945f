// Keyboard shortcuts of the pair page; it works without them, and they can be turned off (WCAG 2.1.4).
"use strict";
document.addEventListener("keydown", (event) => {
  const form = document.getElementById("rating");
  if (!form || event.isComposing || event.altKey || event.metaKey) return;
  if (event.ctrlKey) {
    if (event.key === "Enter") form.requestSubmit();
    return;
  }
  const at = event.target;
  const writing = at instanceof HTMLTextAreaElement || (at instanceof HTMLInputElement && !["radio", "checkbox"].includes(at.type));
  if (writing) return;
  const choice = form.querySelectorAll("input[name=preference]")[Number(event.key) - 1];
  if (choice) {
    choice.checked = true;
    choice.focus();
    event.preventDefault();
  } else if (event.key === "c" || event.key === "C") {
    document.getElementById("comment").focus();
    event.preventDefault();
  }
});
