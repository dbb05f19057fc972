// Markdown as DOM nodes. The text comes from a model and is never parsed as HTML: whatever it holds becomes the text of
// a node. A subset: paragraphs, headings, fenced code, lists, quotes, code spans and emphasis; links stay text.
"use strict";

/** Lists and quotes within each other beyond this depth stay text. */
const MAX_DEPTH = 6;
const FENCE = /^ {0,3}(`{3,}|~{3,})\s*([\w+#.-]*)[^`]*$/;
const HEADING = /^(#{1,6})\s+(.*)$/;
const ITEM = /^( {0,3})([-*+]|\d{1,9}[.)]) +(?=\S)/;
const QUOTE = /^ {0,3}> ?/;
const INLINE = /`([^`\n]+)`|\*\*([^*\n]+)\*\*|\*([^*\s][^*\n]*)\*/g;

/**
 * @typedef {{kind: "code" | "heading" | "list" | "quote" | "paragraph", lines: string[], label?: string}} Block
 * `label` is a code block's language, a heading's level as #s, or a list's first marker.
 */

/**
 * Makes `container` show `text`; blocks whose source is as before keep their nodes, so that a text may grow cheaply.
 * @param {HTMLElement & {blocks?: string[]}} container
 * @param {string} text
 */
function renderMarkdown(container, text) {
  const blocks = splitBlocks(text.replace(/\r\n?/g, "\n").split("\n"), 0);
  const sources = blocks.map((block) => `${block.kind} ${block.label ?? ""}\n${block.lines.join("\n")}`);
  const before = container.blocks ?? [];
  const numSame = sources.findIndex((source, i) => source !== before[i]);
  const firstNew = numSame < 0 ? sources.length : numSame;
  while (container.children.length > firstNew) container.lastElementChild?.remove();
  container.append(...blocks.slice(firstNew).map((block) => blockNode(block, 0)));
  container.blocks = sources;
}

/**
 * @param {string[]} lines
 * @param {number} depth
 * @returns {Block[]}
 */
function splitBlocks(lines, depth) {
  /** @type {Block[]} */
  const blocks = [];
  let i = 0;
  while (i < lines.length) {
    if (!lines[i].trim()) {
      i += 1;
      continue;
    }
    const [block, next] = takeBlock(lines, i, depth);
    blocks.push(block);
    i = next;
  }
  return blocks;
}

/**
 * The block that starts at line `i`, and the line after it.
 * @param {string[]} lines
 * @param {number} i
 * @param {number} depth
 * @returns {[Block, number]}
 */
function takeBlock(lines, i, depth) {
  const fence = FENCE.exec(lines[i]);
  if (fence) return takeCode(lines, i, fence);
  const heading = HEADING.exec(lines[i]);
  if (heading) return [{ kind: "heading", label: heading[1], lines: [heading[2]] }, i + 1];
  if (depth < MAX_DEPTH && ITEM.test(lines[i])) return takeList(lines, i);
  if (depth < MAX_DEPTH && QUOTE.test(lines[i])) {
    const end = endOfRun(lines, i, (line) => QUOTE.test(line));
    return [{ kind: "quote", lines: lines.slice(i, end).map((line) => line.replace(QUOTE, "")) }, end];
  }
  const starts = (/** @type {string} */ line) =>
    FENCE.test(line) || HEADING.test(line) || (depth < MAX_DEPTH && (ITEM.test(line) || QUOTE.test(line)));
  const end = endOfRun(lines, i + 1, (line) => line.trim() !== "" && !starts(line));
  return [{ kind: "paragraph", lines: lines.slice(i, end) }, end];
}

/**
 * @param {string[]} lines
 * @param {number} i
 * @param {(line: string) => boolean} belongs
 */
function endOfRun(lines, i, belongs) {
  while (i < lines.length && belongs(lines[i])) i += 1;
  return i;
}

/**
 * A code block ends at a fence like its own, or with the text, which may still be growing.
 * @param {string[]} lines
 * @param {number} i
 * @param {RegExpExecArray} fence
 * @returns {[Block, number]}
 */
function takeCode(lines, i, fence) {
  const closes = (/** @type {string} */ line) => line.trim() === fence[1];
  const end = endOfRun(lines, i + 1, (line) => !closes(line));
  return [{ kind: "code", label: fence[2], lines: lines.slice(i + 1, end) }, end + 1];
}

/**
 * A list goes on with items of its kind, indented lines, and blank lines between these.
 * @param {string[]} lines
 * @param {number} start
 * @returns {[Block, number]}
 */
function takeList(lines, start) {
  const isOrdered = (/** @type {string} */ line) => /^ *\d/.test(line);
  const belongs = (/** @type {string} */ line) =>
    /^ {2,}\S/.test(line) || (ITEM.test(line) && isOrdered(line) === isOrdered(lines[start]));
  let end = start + 1;
  for (let i = end; i < lines.length; i += 1) {
    if (belongs(lines[i])) end = i + 1;
    else if (lines[i].trim()) break;
  }
  return [{ kind: "list", label: lines[start].trim().split(" ")[0], lines: lines.slice(start, end) }, end];
}

/**
 * The lines of each item, without its marker and indentation.
 * @param {string[]} lines
 * @returns {string[][]}
 */
function splitItems(lines) {
  const indent = (ITEM.exec(lines[0]) ?? ["", ""])[1].length;
  /** @type {string[][]} */
  const items = [];
  let inset = 0;
  for (const line of lines) {
    const marker = ITEM.exec(line);
    if (marker && marker[1].length <= indent) {
      inset = marker[0].length;
      items.push([line.slice(inset)]);
    } else {
      const spaces = line.length - line.trimStart().length;
      items[items.length - 1].push(line.slice(Math.min(spaces, inset)));
    }
  }
  return items;
}

/**
 * @param {Block} block
 * @param {number} depth
 * @returns {HTMLElement}
 */
function blockNode(block, depth) {
  if (block.kind === "code") return codeNode(block);
  if (block.kind === "list") return listNode(block, depth);
  if (block.kind === "quote") {
    const quote = document.createElement("blockquote");
    quote.append(...splitBlocks(block.lines, depth + 1).map((inner) => blockNode(inner, depth + 1)));
    return quote;
  }
  // The page's own headings are of levels 1 and 2.
  const level = Math.min(6, 2 + (block.label ?? "").length);
  const node = document.createElement(block.kind === "heading" ? `h${level}` : "p");
  appendInline(node, block.lines.join("\n"));
  return node;
}

/** @param {Block} block */
function codeNode(block) {
  const pre = document.createElement("pre");
  const code = document.createElement("code");
  code.textContent = block.lines.join("\n");
  // It scrolls sideways, so the keyboard must reach it.
  pre.tabIndex = 0;
  pre.setAttribute("role", "group");
  pre.setAttribute("aria-label", block.label ? `Code in ${block.label}` : "Code");
  pre.append(code);
  return pre;
}

/**
 * @param {Block} block
 * @param {number} depth
 */
function listNode(block, depth) {
  const first = Number.parseInt(block.label ?? "", 10);
  const list = document.createElement(Number.isNaN(first) ? "ul" : "ol");
  if (list instanceof HTMLOListElement) list.start = first;
  for (const lines of splitItems(block.lines)) {
    const item = document.createElement("li");
    item.append(...splitBlocks(lines, depth + 1).map((inner) => blockNode(inner, depth + 1)));
    list.append(item);
  }
  return list;
}

/**
 * Code spans, strong and emphasized text. Each alternative of INLINE ends at the next delimiter, so the time is linear.
 * @param {HTMLElement} parent
 * @param {string} text
 */
function appendInline(parent, text) {
  let end = 0;
  for (const match of text.matchAll(INLINE)) {
    parent.append(text.slice(end, match.index));
    const [whole, code, strong, emphasis] = match;
    const node = document.createElement(code ? "code" : strong ? "strong" : "em");
    if (code) node.textContent = code;
    else appendInline(node, strong ?? emphasis);
    parent.append(node);
    end = match.index + whole.length;
  }
  parent.append(text.slice(end));
}
