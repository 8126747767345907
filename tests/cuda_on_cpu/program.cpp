// One launch: arguments from standard input, what became of the arrays to standard output.
#include <cstdio>
#include <iostream>
#include <string>

static std::vector<std::vector<char>> arrays;
static std::vector<long long> sizes, values;

static void* pointer(int place) { return sizes[place] < 0 ? nullptr : arrays[place].data(); }
static long long scalar(int place) { return values[place]; }

int main() {
    std::string name;
    unsigned blocks, threads, n;
    std::cin >> name >> blocks >> threads >> n;
    arrays.resize(n);
    sizes.resize(n);
    values.resize(n);
    for (unsigned place = 0; place < n; place++) {
        std::cin >> sizes[place] >> values[place];
        std::cin.get();
        if (sizes[place] < 0) continue;
        arrays[place].resize(sizes[place] + 1);  // never a null pointer
        std::cin.read(arrays[place].data(), sizes[place]);
    }
    std::function<void()> kernel;
    // CASES
    engine::launch(blocks, threads, 0, kernel);
    for (unsigned place = 0; place < n; place++) {
        if (sizes[place] >= 0) fwrite(arrays[place].data(), 1, sizes[place], stdout);
    }
    return 0;
}
