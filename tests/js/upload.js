// Uploads a file with tus-js-client, as an application would, and says on stdout, as lines of JSON, how it goes.
// node upload.js '{"endpoint": …, "path": …, "metadata": {…}, …}'; stopAt: break off after so many bytes.
import fs from 'node:fs'
import * as tus from 'tus-js-client'

const { path, stopAt, ...options } = JSON.parse(process.argv[2])
const say = (line) => fs.writeSync(1, `${JSON.stringify(line)}\n`)

const upload = new tus.Upload(fs.createReadStream(path), {
  uploadSize: options.parallelUploads ? null : fs.statSync(path).size,
  retryDelays: Array(100).fill(100),
  storeFingerprintForResuming: false,
  ...options,
  onShouldRetry: (error) => {
    const status = error.originalResponse ? error.originalResponse.getStatus() : 0
    say({ retry: status })
    return status === 0 || status >= 500 || status === 409 || status === 423
  },
  onChunkComplete: async (size, accepted) => {
    say({ accepted })
    if (stopAt && accepted >= stopAt) {
      await upload.abort()
      say({ url: upload.url })
    }
  },
  onSuccess: () => say({ done: upload.url }),
  onError: (error) => {
    say({ error: error.message })
    process.exitCode = 1
  },
})
upload.start()
