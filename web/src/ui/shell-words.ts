/** A word as a POSIX shell takes it. */
export function quote(word: string): string {
  return /^[\w@%+=:,./-]+$/.test(word) ? word : `'${word.replaceAll("'", `'\\''`)}'`;
}

/** Arguments of a command, one option with its value per line. */
export function commandLine(program: string, words: readonly string[]): string {
  const lines: string[] = [];
  for (const word of words) {
    if (word.startsWith("-") || lines.length === 0) lines.push(quote(word));
    else lines[lines.length - 1] += ` ${quote(word)}`;
  }
  return [program, ...lines].join(" \\\n    ");
}
