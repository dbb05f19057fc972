// How messages are shown and announced.
"use strict";

/**
 * @template {keyof HTMLElementTagNameMap} Tag
 * @param {Tag} tag
 * @param {Partial<HTMLElementTagNameMap[Tag]>} [properties]
 * @param {...(Node | string)} children
 * @returns {HTMLElementTagNameMap[Tag]}
 */
function element(tag, properties = {}, ...children) {
  const node = Object.assign(document.createElement(tag), properties);
  node.append(...children);
  return node;
}

const ENDINGS = new Map([
  ["length", "ended at the maximum of tokens"],
  ["stopped", "stopped"],
  ["interrupted", "interrupted"],
]);

/** The nodes of a message; `update` brings them up to what the message holds. */
class MessageView {
  /**
   * @param {Message} message
   * @param {boolean} showTokens
   */
  constructor(message, showTokens) {
    this.message = message;
    this.tokens = showTokens && message.role === "assistant" ? new TokenView() : null;
    this.thought = element("div", { className: "text", dir: "auto" });
    this.summary = element("summary");
    this.thinking = element("details", { className: "thinking" }, this.summary, this.thought);
    this.text = element("div", { className: "text", dir: "auto" });
    this.error = element("p", { className: "error" });
    this.ending = element("span");
    this.actions = element("span", { className: "actions" });
    const name = element("h2", {}, message.role === "user" ? "You" : "Model");
    const footer = element("footer", {}, this.ending, this.actions);
    this.node = element("article", { className: message.role }, name, this.thinking, this.text, this.error, footer);
    this.node.setAttribute("aria-label", message.role === "user" ? "Your message" : "Answer");
    if (this.tokens) this.text.after(this.tokens.node);
    this.update();
  }

  update() {
    const { message } = this;
    const isWriting = message.finish === null;
    this.node.setAttribute("aria-busy", String(isWriting));
    this.thinking.hidden = !message.reasoning.trim();
    this.summary.textContent = isWriting && !message.content ? "Thinking…" : "Thoughts";
    renderMarkdown(this.thought, message.reasoning);
    const tokens = this.tokens ? answerTokens(message) : [];
    const asTokens = tokens.length > 0;
    this.text.hidden = asTokens;
    if (message.role === "user") this.text.textContent = message.content;
    else if (!asTokens) renderMarkdown(this.text, message.content);
    this.tokens?.show(tokens);
    this.error.textContent = message.error;
    this.ending.textContent = endingOf(message);
  }

  /** @param {[label: string, run: () => void][]} actions */
  setActions(actions) {
    const buttons = actions.map(([label, run]) => element("button", { type: "button", onclick: run }, label));
    this.actions.replaceChildren(...buttons);
  }
}

/**
 * What is said below a message: how it ended, and how fast.
 * @param {Message} message
 */
function endingOf({ finish, timing }) {
  const parts = [ENDINGS.get(finish ?? "") ?? ""];
  if (timing?.numTokens) {
    parts.push(timing.numTokens === 1 ? "1 token" : `${timing.numTokens} tokens`);
    if (timing.seconds > 0) parts.push(`${((timing.numTokens - 1) / timing.seconds).toFixed(1)} tokens/s`);
  }
  if (timing?.firstToken) parts.push(`first after ${timing.firstToken.toFixed(2)} s`);
  return parts.filter(Boolean).join(" · ");
}

/** An answer's tokens, the more colored the less likely they were; the one pointed at, or gone to, is explained. */
class TokenView {
  constructor() {
    this.row = element("div", { className: "tokens", dir: "auto", tabIndex: 0 });
    this.row.setAttribute("role", "group");
    this.row.setAttribute("aria-label", "Tokens colored by probability; the arrow keys go through them");
    this.detail = element("p", { className: "token-detail" });
    this.detail.setAttribute("role", "status");
    this.node = element("div", { hidden: true }, this.row, this.detail);
    /** @type {Token[]} */
    this.tokens = [];
    this.current = -1;
    this.row.addEventListener("keydown", (event) => this.#move(event));
    this.row.addEventListener("pointerover", (event) => this.#explain([...this.row.children].indexOf(
      /** @type {Element} */ (event.target))));
  }

  /** @param {Token[]} tokens all so far */
  show(tokens) {
    this.tokens = tokens;
    this.node.hidden = tokens.length === 0;
    this.row.append(...tokens.slice(this.row.children.length).map(tokenNode));
  }

  /** @param {KeyboardEvent} event */
  #move(event) {
    const steps = new Map([["ArrowRight", 1], ["ArrowDown", 1], ["ArrowLeft", -1], ["ArrowUp", -1]]);
    const step = steps.get(event.key);
    if (step === undefined) return;
    event.preventDefault();
    this.#explain(Math.min(Math.max(this.current + step, 0), this.tokens.length - 1));
  }

  /** @param {number} i */
  #explain(i) {
    if (i < 0 || i >= this.tokens.length) return;
    this.row.children[this.current]?.classList.remove("current");
    this.row.children[i].classList.add("current");
    this.current = i;
    const { text, logprob, alternatives } = this.tokens[i];
    const others = alternatives.map((other) => `${JSON.stringify(other.text)} ${percent(other.logprob)}`).join(", ");
    this.detail.textContent = `${JSON.stringify(text)} ${percent(logprob)}${others && `; instead: ${others}`}`;
  }
}

/** @param {Token} token */
function tokenNode({ text, logprob }) {
  const node = element("span", {}, text);
  // Six nats of surprise, a probability of 0.25%, have the full color.
  node.style.setProperty("--surprise", `${Math.round(Math.min(-logprob / 6, 1) * 100)}%`);
  return node;
}

/** @param {number} logprob */
function percent(logprob) {
  return `${(100 * Math.exp(logprob)).toPrecision(3)}%`;
}

/** Says an answer to screen readers block by block, each once it is whole, and never token by token. */
class Announcer {
  /** @param {HTMLElement} region a live region */
  constructor(region) {
    this.region = region;
    this.numSaid = 0;
  }

  /** @param {string} text */
  say(text) {
    this.region.append(element("p", {}, text));
    while (this.region.children.length > 50) this.region.firstElementChild?.remove();
  }

  start() {
    this.numSaid = 0;
    this.region.replaceChildren();
    this.say("The model is answering.");
  }

  /** @param {Message} message */
  follow(message) {
    const blocks = splitBlocks(message.content.split("\n"), 0);
    const numWhole = message.finish === null ? blocks.length - 1 : blocks.length;
    for (const block of blocks.slice(this.numSaid, numWhole)) this.say(block.lines.join("\n"));
    this.numSaid = Math.max(this.numSaid, numWhole);
  }
}
