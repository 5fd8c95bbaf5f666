// The registration of operators: by name, with arguments of any type.
#pragma once

#include <map>

#include "ops.h"

namespace stand_in {

using Tensor = torch::stable::Tensor;
using Value = std::variant<std::monostate, Tensor, std::vector<Tensor>, int64_t, double, bool, std::string>;
using Operator = std::function<Value(const std::vector<Value>&)>;

inline std::map<std::string, Operator>& operators() {
  static std::map<std::string, Operator> all;
  return all;
}

template <class T>
struct From {
  static T value(const Value& v) { return std::get<T>(v); }
};
template <class T>
struct From<std::optional<T>> {
  static std::optional<T> value(const Value& v) { return v.index() == 0 ? std::nullopt : std::optional<T>(From<T>::value(v)); }
};

template <class Result, class... Arguments, size_t... I>
Value call(Result (*f)(Arguments...), const std::vector<Value>& values, std::index_sequence<I...>) {
  if constexpr (std::is_void_v<Result>) {
    f(From<std::decay_t<Arguments>>::value(values.at(I))...);
    return {};
  } else {
    return f(From<std::decay_t<Arguments>>::value(values.at(I))...);
  }
}

template <class Result, class... Arguments>
Operator boxed(Result (*f)(Arguments...)) {
  return [f](const std::vector<Value>& values) { return call(f, values, std::index_sequence_for<Arguments...>()); };
}

struct Library {
  const char* prefix;
  void impl(const char* name, Operator f) { operators()[std::string(prefix) + "::" + name] = std::move(f); }
  void def(const char*) {}
};

struct Registration {
  Registration(const char* prefix, void (*fill)(Library&)) {
    Library library{prefix};
    fill(library);
  }
};

}  // namespace stand_in

#define STAND_IN_TEXT_(name) #name
#define STAND_IN_TEXT(name) STAND_IN_TEXT_(name)
#define STAND_IN_JOIN_(a, b) a##b
#define STAND_IN_JOIN(a, b) STAND_IN_JOIN_(a, b)
#define STAND_IN_LIBRARY(prefix, m, number)                                                          \
  static void STAND_IN_JOIN(stand_in_fill_, number)(::stand_in::Library & m);                        \
  static const ::stand_in::Registration STAND_IN_JOIN(stand_in_registered_, number)(STAND_IN_TEXT(prefix), &STAND_IN_JOIN(stand_in_fill_, number)); \
  static void STAND_IN_JOIN(stand_in_fill_, number)([[maybe_unused]] ::stand_in::Library & m)

#define STABLE_TORCH_LIBRARY(prefix, m) STAND_IN_LIBRARY(prefix, m, __COUNTER__)
#define STABLE_TORCH_LIBRARY_IMPL(prefix, key, m) STAND_IN_LIBRARY(prefix, m, __COUNTER__)
#define TORCH_BOX(f) ::stand_in::boxed(f)
