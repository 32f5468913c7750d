// A button on each program, file and command that copies it; what a command prints has none.
"use strict";

function selectAll(pre) {
  const range = document.createRange();
  range.selectNodeContents(pre);
  getSelection().removeAllRanges();
  getSelection().addRange(range);
}

async function copy(pre) {
  // The newline at the end would run the last command at once.
  const text = pre.textContent.trimEnd();
  if (navigator.clipboard) return navigator.clipboard.writeText(text);
  // Over http a browser gives no clipboard.
  selectAll(pre);
  document.execCommand("copy");
}

for (const pre of document.querySelectorAll(".highlight pre")) {
  if (pre.closest(".output, .drawing")) continue;
  // Its words come from the style sheet: the text of the block stays the program alone.
  const button = document.createElement("button");
  button.type = "button";
  button.className = "copy";
  button.ariaLabel = "Copy";
  button.addEventListener("click", async () => {
    try {
      await copy(pre);
      button.ariaLabel = "Copied";
    } catch {
      selectAll(pre);
    }
    setTimeout(() => (button.ariaLabel = "Copy"), 2000);
  });
  pre.prepend(button);
}
