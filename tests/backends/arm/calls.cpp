// Runs functions of kernels/cpu in this process on memory that its parent sends (arm_library.py):
// linked with the kernels for another kind of CPU, it runs under an emulator.
//
// A call is a sequence of int64, native byte order: the function's number, the number of buffers;
// for each its size and then its bytes; the number of pointers in buffers; for each the buffer and
// offset it lies at and those it points to; the number of arguments, at most 12; for each a buffer,
// or -1, and an offset or the value. The answer is the result and then the buffers' bytes.
#include <unistd.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

extern "C" {
#define FUNCTION(name) void name();
#include "functions.inc"
#undef FUNCTION
}

namespace {

using Function = int64_t (*)(int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t,
                             int64_t, int64_t, int64_t, int64_t);

const Function FUNCTIONS[] = {
#define FUNCTION(name) reinterpret_cast<Function>(name),
#include "functions.inc"
#undef FUNCTION
};

void read_all(void* to, size_t size) {
  for (char* at = static_cast<char*>(to); size > 0;) {
    const ssize_t n = read(0, at, size);
    if (n <= 0) std::exit(n < 0);  // the parent has closed the pipe
    at += n, size -= n;
  }
}
void write_all(const void* from, size_t size) {
  for (const char* at = static_cast<const char*>(from); size > 0;) {
    const ssize_t n = write(1, at, size);
    if (n <= 0) std::exit(1);
    at += n, size -= n;
  }
}
int64_t number() {
  int64_t n;
  read_all(&n, sizeof n);
  return n;
}

struct Free {
  void operator()(char* p) const { std::free(p); }
};
struct Buffer {
  std::unique_ptr<char, Free> at;
  int64_t size;
};

}  // namespace

int main() {
  for (;;) {
    const Function function = FUNCTIONS[number()];
    std::vector<Buffer> buffers(number());
    for (Buffer& b : buffers) {
      b.size = number();
      b.at.reset(static_cast<char*>(std::aligned_alloc(64, (b.size + 64) / 64 * 64)));
      read_all(b.at.get(), b.size);
    }
    for (int64_t count = number(); count > 0; count--) {
      const int64_t holder = number(), place = number(), target = number(), offset = number();
      const char* pointer = buffers[target].at.get() + offset;
      memcpy(buffers[holder].at.get() + place, &pointer, sizeof pointer);
    }
    int64_t arguments[12] = {};
    for (int64_t i = 0, count = number(); i < count; i++) {
      const int64_t buffer = number(), value = number();
      arguments[i] =
          buffer < 0 ? value : reinterpret_cast<int64_t>(buffers[buffer].at.get() + value);
    }
    const int64_t* a = arguments;
    const int64_t result =
        function(a[0], a[1], a[2], a[3], a[4], a[5], a[6], a[7], a[8], a[9], a[10], a[11]);
    write_all(&result, sizeof result);
    for (const Buffer& b : buffers) write_all(b.at.get(), b.size);
  }
}
