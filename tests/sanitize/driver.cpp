// Runs a corpus of calls of the operators: sanitize CORPUS RESULTS [THREADS]. tests/sanitize/corpus.py writes the one file and reads the other.
//
// Every call runs with one thread and with several, which must give the same bytes. Afterwards several threads call observe_ at the same time
// with one state, as a model that serves several requests does.

#include <torch/csrc/stable/library.h>

#include <cstdio>
#include <fstream>

namespace {

using stand_in::Value;
using torch::stable::Tensor;

struct Reader {
  std::ifstream file;
  template <class T>
  T number() {
    T value;
    file.read(reinterpret_cast<char*>(&value), sizeof value);
    if (!file) throw std::runtime_error("the corpus ends too early");
    return value;
  }
  std::string text() {
    std::string value(number<uint32_t>(), '\0');
    file.read(value.data(), std::streamsize(value.size()));
    return value;
  }
  std::vector<int64_t> numbers() {
    std::vector<int64_t> values(number<uint32_t>());
    for (int64_t& value : values) value = number<int64_t>();
    return values;
  }
};

// A call as it is in the file: each run gets storages of its own.
struct Case {
  std::string name;
  std::vector<std::string> storages;
  struct Argument {
    char kind;
    int64_t whole = 0;
    double real = 0;
    std::string text;
    struct View {
      int type;
      std::vector<int64_t> sizes, strides;
      int64_t offset;
      uint32_t storage;
    };
    std::vector<View> views;
  };
  std::vector<Argument> arguments;
};

Case::Argument::View read_view(Reader& in) {
  Case::Argument::View view;
  view.type = in.number<uint8_t>();
  view.sizes = in.numbers(), view.strides = in.numbers();
  view.offset = in.number<int64_t>(), view.storage = in.number<uint32_t>();
  return view;
}

Case read_case(Reader& in) {
  Case result;
  result.name = in.text();
  result.storages.resize(in.number<uint32_t>());
  for (std::string& storage : result.storages) storage = in.text();
  result.arguments.resize(in.number<uint32_t>());
  for (Case::Argument& a : result.arguments) {
    a.kind = char(in.number<uint8_t>());
    switch (a.kind) {
      case 'n': break;
      case 'i': case 'b': a.whole = in.number<int64_t>(); break;
      case 'd': a.real = in.number<double>(); break;
      case 's': a.text = in.text(); break;
      case 't': a.views.push_back(read_view(in)); break;
      case 'l':
        a.views.resize(in.number<uint32_t>());
        for (auto& view : a.views) view = read_view(in);
        break;
      default: throw std::runtime_error("the corpus is damaged");
    }
  }
  return result;
}

struct Call {
  std::vector<std::shared_ptr<stand_in::Storage>> storages;
  std::vector<Value> values;

  explicit Call(const Case& from) {
    for (const std::string& bytes : from.storages) {
      storages.push_back(std::make_shared<stand_in::Storage>(int64_t(bytes.size())));
      if (!bytes.empty()) std::memcpy(storages.back()->data, bytes.data(), bytes.size());
    }
    for (const Case::Argument& a : from.arguments) {
      std::vector<Tensor> tensors;
      for (const auto& view : a.views) {
        auto data = std::make_shared<stand_in::TensorData>();
        data->type = torch::headeronly::ScalarType(view.type);
        data->sizes = view.sizes, data->strides = view.strides, data->offset = view.offset, data->storage = storages.at(view.storage);
        tensors.push_back(Tensor(data));
      }
      switch (a.kind) {
        case 'n': values.emplace_back(); break;
        case 'i': values.emplace_back(a.whole); break;
        case 'b': values.emplace_back(a.whole != 0); break;
        case 'd': values.emplace_back(a.real); break;
        case 's': values.emplace_back(a.text); break;
        case 't': values.emplace_back(tensors[0]); break;
        default: values.emplace_back(tensors);
      }
    }
  }
};

// What a call leaves: whether it was refused, every storage, and the tensor that it returns.
std::string outcome(const Case& from) {
  Call call(from);
  std::string out;
  auto add = [&](const void* data, uint32_t bytes) {
    out.append(reinterpret_cast<const char*>(&bytes), sizeof bytes);
    if (bytes) out.append(static_cast<const char*>(data), bytes);
  };
  std::string refusal;
  Value result;
  try {
    result = stand_in::operators().at(from.name)(call.values);
  } catch (const stand_in::Refused& error) {
    refusal = error.what();
    if (refusal.empty()) refusal = "refused";
  }
  add(refusal.data(), uint32_t(refusal.size()));
  for (const auto& storage : call.storages) add(storage->data, uint32_t(storage->bytes));
  if (const Tensor* tensor = std::get_if<Tensor>(&result))
    add(tensor->const_data_ptr(), uint32_t(tensor->numel() * int64_t(tensor->element_size())));
  return out;
}

// The first double of a state counts calls.
void share(const Case& from, int64_t threads) {
  Call call(from);
  const Tensor& state = std::get<Tensor>(call.values.at(0));
  const double before = *static_cast<const double*>(state.const_data_ptr());
  const auto& observe = stand_in::operators().at(from.name);
  std::vector<std::thread> all;
  for (int64_t i = 0; i < threads; ++i) all.emplace_back([&] { observe(call.values); });
  const auto read = stand_in::operators().find("torchprobe::observe_read");
  if (read != stand_in::operators().end()) read->second({Value(std::vector<Tensor>{state})});
  for (std::thread& one : all) one.join();
  if (*static_cast<const double*>(state.const_data_ptr()) != before + double(threads)) throw std::runtime_error("a call was lost");
}

// Faults that were planted: each sanitizer must report its own, or its silence says nothing.
void beyond(Tensor t) {
  volatile char* data = static_cast<volatile char*>(t.mutable_data_ptr());
  data[0] = data[t.get()->storage->bytes];
}
void overflow(int64_t number) {
  volatile int64_t sum = number;
  sum = sum + number;
}
void race(Tensor t) {
  double* data = static_cast<double*>(t.mutable_data_ptr());
  torch::stable::parallel_for(0, 64, 1, [&](int64_t begin, int64_t) { data[0] += double(begin); });
}

}  // namespace

STABLE_TORCH_LIBRARY(planted, m) {
  m.impl("beyond", TORCH_BOX(&beyond));
  m.impl("overflow", TORCH_BOX(&overflow));
  m.impl("race", TORCH_BOX(&race));
}

int main(int count, char** arguments) try {
  if (count < 3) throw std::runtime_error("usage: sanitize CORPUS RESULTS [THREADS]");
  const int64_t threads = count > 3 ? std::atoll(arguments[3]) : 3;
  Reader in{std::ifstream(arguments[1], std::ios::binary)};
  std::ofstream results(arguments[2], std::ios::binary);
  const uint32_t cases = in.number<uint32_t>();
  for (uint32_t i = 0; i < cases; ++i) {
    const Case from = read_case(in);
    if (!stand_in::operators().count(from.name)) throw std::runtime_error("no operator " + from.name);
    stand_in::threads = 1;
    const std::string one = outcome(from);
    const bool host = from.name.rfind("shim::", 0) == 0;  // CUDA on the host: its threads are its own
    stand_in::threads = host ? 1 : threads;
    if (!host && outcome(from) != one) throw std::runtime_error("case " + std::to_string(i) + ": " + from.name + " depends on the number of threads");
    stand_in::threads = 1;
    uint32_t refused;
    std::memcpy(&refused, one.data(), sizeof refused);
    if (from.name == "torchprobe::observe_" && !refused) share(from, threads);
    results.write(one.data(), std::streamsize(one.size()));
  }
  std::printf("%u calls\n", cases);
  return 0;
} catch (const std::exception& error) {
  std::fprintf(stderr, "%s\n", error.what());
  return 1;
}
