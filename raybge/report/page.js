// The page is complete without this script, which adds a copy button to commands and highlights a trial under the pointer.
for (const block of document.querySelectorAll("pre.command")) {
  const button = document.createElement("button");
  button.type = "button";
  button.textContent = "copy";
  button.onclick = () =>
    navigator.clipboard
      .writeText(block.firstElementChild.textContent)
      .then(() => (button.textContent = "copied"))
      .catch(() => getSelection().selectAllChildren(block.firstElementChild));
  block.append(button);
}
let shown = null;
document.addEventListener("pointerover", (event) => {
  const number = event.target.closest("[data-t]")?.dataset.t ?? null;
  if (number === shown) return;
  shown = number;
  document.querySelectorAll(".lit").forEach((each) => each.classList.remove("lit"));
  document.body.classList.toggle("picking", number !== null);
  if (number !== null) document.querySelectorAll(`[data-t="${number}"]`).forEach((each) => each.classList.add("lit"));
});
